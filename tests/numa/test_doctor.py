"""What the doctor finds on machines and in circumstances that are as they are on purpose."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from numagraft.doctor import Circumstances, Diagnosis, diagnose
from numagraft.platform import Platform

from . import syscalls
from .control_groups import control_group, join
from .syscalls import INTERLEAVE, MIB, in_child

pytestmark = pytest.mark.numa


def findings() -> dict[str, tuple[str, str]]:
    """topic -> (severity, what was found and what to do)."""
    diagnosis: Diagnosis = diagnose(Circumstances.of(Platform.detect()))
    return {finding.topic: (finding.severity, f"{finding.found} -> {finding.remedy}") for finding in diagnosis.findings}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[str, str]]:
    return findings()


def test_the_machine_itself(lab, undisturbed):
    """Each finding where its cause is, and not where it is not."""
    nodes = lab.with_cpus
    causes = {
        "numa-balancing": lab.numa_balancing,
        "memory-less-nodes": any(node not in lab.with_memory for node in nodes),
        "memory-only-nodes": any(node not in nodes for node in lab.with_memory),
        "nodes-per-socket": len({lab.socket_of(node) for node in nodes}) < len(nodes),
        "smt": lab.threads_per_core > 1,
        "offline-cpus": bool(lab.offline),
        "huge-pages": lab.huge_2m > 0,
        "one-node": len(lab.online) == 1,
        "hidden-nodes": False,
        "binding": False,
        "pinning": False,
        "page-query": False,
        "affinity": False,
        "mems-allowed": False,
        "memory-policy": False,
        "memory-limit": False,
    }
    assert {topic: topic in undisturbed for topic in causes} == causes
    if lab.numa_balancing:
        severity, text = undisturbed["numa-balancing"]
        assert severity == "hurts" and "sysctl -w kernel.numa_balancing=0" in text


def test_a_container_filter(full_nodes):
    def inside() -> dict:
        syscalls.refuse("mbind", "set_mempolicy", "get_mempolicy", "move_pages", errno=errno.EPERM)
        return findings()

    found = in_child(inside)
    assert found["binding"][0] == "advice"
    assert "EPERM" in found["binding"][1] and "SYS_NICE" in found["binding"][1]
    assert "page-query" in found


def test_an_inherited_policy(full_nodes):
    def inside() -> dict:
        syscalls.set_mempolicy(INTERLEAVE, full_nodes)
        return findings()

    severity, text = in_child(inside)["memory-policy"]
    assert severity == "advice" and "interleave" in text and "without numactl" in text


def test_masks_cpusets_and_limits(lab, full_nodes):
    first = full_nodes[0]

    def inside() -> dict:
        join(group)
        os.sched_setaffinity(0, lab.cpus_of(first)[:1])
        return findings()

    with control_group("narrow", cpuset_mems=str(first), memory_max=str(256 * MIB)) as group:
        found = in_child(inside)
    assert {"affinity", "mems-allowed", "memory-limit"} <= set(found)
    assert "256" in found["memory-limit"][1]
    assert f"memory of nodes {first} is allowed" in found["mems-allowed"][1]


def test_cpus_and_memory_of_different_nodes(lab, full_nodes):
    first, last = full_nodes[0], full_nodes[-1]

    def inside() -> dict:
        join(group)
        os.sched_setaffinity(0, lab.cpus_of(last))
        return findings()

    with control_group("apart", cpuset_mems=str(first)) as group:
        severity, text = in_child(inside)["apart"]
    assert severity == "hurts" and "remotely" in text


def test_a_node_that_is_nearly_full(lab, full_nodes):
    node = full_nodes[-1]

    with syscalls.filled(node, leave=8 * MIB):
        severity, text = findings()["free-memory"]
    assert severity == "advice" and f"node {node} has" in text


@pytest.mark.slow
def test_measuring_ends_in_time(lab, tmp_path):
    """The command itself, start-up and all, on a machine tens of times slower than any that it is made for."""

    def timed(*more: str) -> tuple[dict, float]:
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", "from numagraft.cli.main import run; run()", "doctor", "--json", *more],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - begin

    _, startup = timed()
    found, seconds = timed("--measure")
    measured = found["measurement"]
    nodes = [node for node in lab.with_memory if node in lab.with_cpus]
    assert measured["compute_nodes"] == nodes
    assert len(measured["read_gb_per_s"]) == len(nodes)
    assert all(len(row) == len(lab.with_memory) and min(row) > 0 for row in measured["latency_ns"])
    assert len(list(tmp_path.rglob("*.json"))) == 1, "it is kept"
    # 5 s is what starting up takes where the host does nothing else
    assert measured["seconds"] < seconds < 20 * max(1.0, startup / 5)
