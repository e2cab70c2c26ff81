"""Every finding appears where it should, and only there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from numagraft.cli import doctor_command
from numagraft.doctor import Backend, Circumstances, diagnose
from numagraft.platform import Cgroup, CpuModel, Gpu, HugePages, Kernel, MemoryModule, MemoryPolicy, Platform

TOPOLOGIES = Path(__file__).resolve().parent / "topologies"
GIB = 1 << 30

QUIET = Kernel(
    numa_balancing=0,
    transparent_hugepage="madvise",
    max_map_count=65530,
    overcommit_memory=0,
    zone_reclaim_mode=0,
    governors=("performance",),
)
SOUND = replace(Platform.virtual(2, cores_per_node=4, isa=("avx2", "avx512", "avx512_vnni")), live=True, kernel=QUIET)
SOUND = replace(SOUND, cpu=replace(SOUND.cpu, arch="x86_64"))
ONE_NODE = replace(Platform.virtual(1, cores_per_node=4), live=True, kernel=QUIET)
BACKEND = Backend("avx512_vnni", ("avx512_vnni", "avx512", "avx2", "scalar"))
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def look(platform=SOUND, *, backend=BACKEND, refused=None, environment=PASSIVE, compute_modes=None, mps=False):
    return diagnose(Circumstances(platform, backend, refused or {}, environment, compute_modes or {}, mps))


def kernel(platform=SOUND, **changes):
    return replace(platform, kernel=replace(platform.kernel, **changes))


def nodes(*changes, platform=SOUND):
    return replace(
        platform, nodes=tuple(replace(node, **change) for node, change in zip(platform.nodes, changes, strict=True))
    )


def gpu(**changes):
    base = Gpu("0000:3b:00.0", "nvidia", "H100", node=0, driver="nvidia", memory_bytes=80 * GIB)
    return replace(SOUND, gpus=(replace(base, **changes),))


def modules(*sizes, speeds=()):
    return replace(
        SOUND,
        memory_modules=tuple(
            MemoryModule(f"DIMM_{i}", bytes=size * GIB, mega_transfers=speeds[i] if speeds else 4800, kind="DDR5")
            for i, size in enumerate(sizes)
        ),
    )


def test_a_sound_machine_has_nothing_to_mend():
    diagnosis = look()
    assert diagnosis.ok
    assert diagnosis.findings == ()


#: topic, severity, what is planted, and words of what is found or advised
PLANTED = [
    ("numa-balancing", "hurts", lambda: look(kernel(numa_balancing=1)), "sysctl -w kernel.numa_balancing=0"),
    ("zone-reclaim", "hurts", lambda: look(kernel(zone_reclaim_mode=1)), "sysctl -w vm.zone_reclaim_mode=0"),
    ("thp", "advice", lambda: look(kernel(transparent_hugepage="never")), "echo madvise"),
    ("max-map-count", "advice", lambda: look(kernel(max_map_count=60000)), "vm.max_map_count=65530"),
    ("max-map-count", "hurts", lambda: look(kernel(max_map_count=1000)), "is 1000"),
    ("overcommit", "advice", lambda: look(kernel(overcommit_memory=2)), "vm.overcommit_memory is 2"),
    ("governor", "advice", lambda: look(kernel(governors=("powersave",))), "cpupower"),
    (
        "hidden-nodes",
        "hurts",
        lambda: look(
            replace(
                ONE_NODE,
                cpus=tuple(replace(cpu, socket=cpu.id // 2) for cpu in ONE_NODE.cpus),
            )
        ),
        "2 sockets but 1 NUMA node",
    ),
    (
        "nodes-per-socket",
        "note",
        lambda: look(replace(Platform.virtual(8, sockets=2, cores_per_node=4), kernel=QUIET), environment={}),
        "8 copies of a weight, per socket 2",
    ),
    ("one-node", "note", lambda: look(ONE_NODE, backend=None), "one NUMA node"),
    (
        "memory-less-nodes",
        "advice",
        lambda: look(replace(nodes({}, {"total_bytes": 0, "free_bytes": 0}), allowed_nodes=(0,))),
        "nodes without memory: 1",
    ),
    (
        "memory-only-nodes",
        "note",
        lambda: look(nodes({}, {"cpus": (), "read_mb_per_s": 20000})),
        "node 1 has memory but no CPUs (CXL, or HBM in flat mode, firmware says 20 GB/s)",
    ),
    (
        "offline-cpus",
        "advice",
        lambda: look(
            replace(
                SOUND,
                cpus=(*SOUND.cpus[:-1], replace(SOUND.cpus[-1], online=False)),
                allowed_cpus=SOUND.allowed_cpus[:-1],
            )
        ),
        "1 CPUs are offline (7)",
    ),
    (
        "smt",
        "note",
        lambda: look(
            replace(Platform.virtual(2, cores_per_node=4, threads_per_core=2), kernel=QUIET),
            backend=None,
        ),
        "2 hardware threads per core",
    ),
    ("free-memory", "advice", lambda: look(nodes({}, {"free_bytes": GIB})), "node 1 has 1.00 GiB of 64.0 GiB"),
    ("free-imbalance", "advice", lambda: look(nodes({}, {"free_bytes": 20 * GIB})), "of node 1 31%"),
    (
        "uneven-memory",
        "advice",
        lambda: look(nodes({}, {"total_bytes": 128 * GIB, "free_bytes": 128 * GIB})),
        "node 1 has 128",
    ),
    (
        "huge-pages",
        "note",
        lambda: look(nodes(*[{"huge_pages": (HugePages(2 << 20, 8, 4),)}] * 2)),
        "16 huge pages of 2.00 MiB are reserved (8 free): node 0: 8, node 1: 8",
    ),
    (
        "huge-pages-uneven",
        "advice",
        lambda: look(nodes({"huge_pages": (HugePages(2 << 20, 8, 8),)}, {"huge_pages": (HugePages(2 << 20, 0, 0),)})),
        "hugepages-2048kB/nr_hugepages",
    ),
    ("memory-modules", "note", lambda: look(modules(32, 32)), "DDR5 modules: 2 x 32.0 GiB at 4800 MT/s"),
    ("empty-slots", "advice", lambda: look(modules(32, 0)), "1 of 2 memory slots are empty: DIMM_1"),
    ("mixed-modules", "advice", lambda: look(modules(32, 16)), "1 x 16.0 GiB, 1 x 32.0 GiB"),
    ("mixed-speeds", "advice", lambda: look(modules(32, 32, speeds=(4400, 4800))), "4400, 4800 MT/s"),
    ("affinity", "note", lambda: look(replace(SOUND, allowed_cpus=(0, 1))), "2 of 8 CPUs are allowed: 0-1"),
    ("mems-allowed", "note", lambda: look(replace(SOUND, allowed_nodes=(1,))), "memory of nodes 1 is allowed, of 0-1"),
    (
        "apart",
        "hurts",
        lambda: look(replace(SOUND, allowed_nodes=(1,), allowed_cpus=(0, 1))),
        "CPUs 0-1 and the memory of nodes 1 are on different nodes",
    ),
    (
        "memory-policy",
        "advice",
        lambda: look(replace(SOUND, policy=MemoryPolicy("interleave", (0, 1)))),
        "inherited the memory policy interleave over nodes 0-1",
    ),
    (
        "memory-limit",
        "note",
        lambda: look(replace(SOUND, cgroup=Cgroup(2, memory_limit=8 * GIB, memory_used=GIB))),
        "the control group allows 8.00 GiB of 128 GiB; 7.00 GiB are left",
    ),
    (
        "memory-limit",
        "advice",
        lambda: look(replace(SOUND, cgroup=Cgroup(2, memory_limit=8 * GIB, memory_used=8 * GIB))),
        "0 B are left",
    ),
    ("cpu-quota", "advice", lambda: look(replace(SOUND, cgroup=Cgroup(2, cpu_quota=2.5))), "pays for 2.5 CPUs of 8"),
    (
        "binding",
        "advice",
        lambda: look(
            kernel(container="docker"), refused={"mbind": "EPERM", "set_mempolicy": "EPERM", "move_pages": "EPERM"}
        ),
        "in this docker container (mbind: EPERM, set_mempolicy: EPERM); memory is placed by first touch",
    ),
    ("binding", "advice", lambda: look(refused={"mbind": "EPERM"}), "memory is placed by set_mempolicy instead"),
    (
        "binding",
        "hurts",
        lambda: look(refused={"mbind": "EPERM", "set_mempolicy": "EPERM", "sched_setaffinity": "EPERM"}),
        "nothing can be placed",
    ),
    ("binding", "note", lambda: look(ONE_NODE, backend=None, refused={"mbind": "ENOSYS"}), "mbind: ENOSYS"),
    ("binding", "hurts", lambda: look(refused={"mbind": "misplaced"}), "the page then lies elsewhere"),
    ("binding", "note", lambda: look(refused={"set_mempolicy": "EPERM"}), "mbind works"),
    ("pinning", "hurts", lambda: look(refused={"sched_setaffinity": "EPERM"}), "threads cannot be pinned"),
    ("page-query", "note", lambda: look(refused={"move_pages": "EPERM"}), "numa_maps instead"),
    ("policy-query", "note", lambda: look(refused={"get_mempolicy": "EPERM"}), "cannot be seen"),
    ("openmp-spinning", "hurts", lambda: look(environment={"OMP_WAIT_POLICY": "active"}), "OMP_WAIT_POLICY=PASSIVE"),
    ("openmp-spinning", "hurts", lambda: look(environment={**PASSIVE, "KMP_BLOCKTIME": "200"}), "KMP_BLOCKTIME=200"),
    ("openmp-spinning", "note", lambda: look(environment={}), "is not set"),
    ("openmp-pinning", "advice", lambda: look(environment={**PASSIVE, "OMP_PROC_BIND": "true"}), "OMP_PROC_BIND=true"),
    ("openmp-threads", "advice", lambda: look(environment={**PASSIVE, "OMP_NUM_THREADS": "64"}), "there are 8 cores"),
    (
        "isa",
        "hurts",
        lambda: look(replace(SOUND, cpu=CpuModel("x86_64", features=("avx",))), backend=None),
        "-cpu host",
    ),
    (
        "isa-blocked",
        "hurts",
        lambda: look(replace(SOUND, cpu=replace(SOUND.cpu, features=("amx_tile",), blocked=("amx_tile",)))),
        "has amx_tile, but this process may not use it",
    ),
    ("isa-forced", "hurts", lambda: look(backend=replace(BACKEND, isa="scalar", forced=True)), "avx512_vnni would run"),
    ("isa-forced", "note", lambda: look(backend=replace(BACKEND, forced=True)), "forces avx512_vnni"),
    (
        "isa-unused",
        "advice",
        lambda: look(backend=Backend("avx2", ("avx2", "scalar"))),
        "the CPU can run avx512_vnni, but the backend has no such kernels",
    ),
    ("backend", "hurts", lambda: look(backend=Backend(error="ImportError: x")), "does not work: ImportError: x"),
    ("sanitizer", "hurts", lambda: look(backend=replace(BACKEND, sanitizer="thread")), "the thread sanitizer"),
    ("gpu", "note", lambda: look(gpu()), "0000:3b:00.0 nvidia H100: nearest node 0, 80.0 GiB, driver nvidia"),
    ("gpu-node", "advice", lambda: look(gpu(node=None)), "does not tell which node"),
    (
        "gpu-node",
        "advice",
        lambda: look(replace(gpu(), allowed_nodes=(1,), allowed_cpus=(4, 5))),
        "hangs on node 0, but this process may use memory of nodes 1 only",
    ),
    ("gpu-driver", "advice", lambda: look(gpu(driver="")), "has no driver bound"),
    ("mps", "note", lambda: look(gpu(), mps=True), "the MPS daemon runs"),
    (
        "gpu-compute-mode",
        "hurts",
        lambda: look(gpu(), compute_modes={"0000:3b:00.0": "Prohibited"}),
        "nothing may compute",
    ),
    ("gpu-compute-mode", "advice", lambda: look(gpu(), compute_modes={"a": "Exclusive_Process"}), "no MPS daemon"),
    ("memlock", "advice", lambda: look(replace(gpu(), memlock_bytes=8 << 20)), "RLIMIT_MEMLOCK is 8.00 MiB"),
    ("platform", "note", lambda: look(replace(SOUND, notes=("strange",))), "strange"),
]


@pytest.mark.parametrize(("topic", "severity", "planted", "words"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED])
def test_findings(topic, severity, planted, words):
    diagnosis = planted()
    found = [finding for finding in diagnosis.findings if finding.topic == topic]
    assert len(found) == 1, diagnosis.findings
    assert found[0].severity == severity
    assert words in found[0].found + " " + found[0].remedy
    assert diagnosis.ok is (not any(finding.severity == "hurts" for finding in diagnosis.findings))
    if severity != "note":
        assert found[0].remedy


def test_every_topic_in_the_source_is_planted_here():
    source = Path(doctor_command.__file__).parent.parent / "doctor"
    pattern = re.compile(r'Finding\(\s*(?:"\w+"|[^,]*?),\s*"([a-z-]+)"')
    topics = {topic for path in source.glob("*.py") for topic in pattern.findall(path.read_text())}
    assert topics - {"uneven-bandwidth"} == {planted[0] for planted in PLANTED}  # that one: test_measurement.py


@pytest.mark.parametrize(
    "planted",
    [
        lambda: look(kernel(ONE_NODE, numa_balancing=1, zone_reclaim_mode=1), backend=None),
        lambda: look(environment={**PASSIVE, "KMP_BLOCKTIME": "0", "OMP_PROC_BIND": "false", "OMP_NUM_THREADS": "8"}),
        lambda: look(kernel(governors=("schedutil",), max_map_count=1 << 20)),
        lambda: look(replace(SOUND, cgroup=Cgroup(2, memory_limit=1 << 50, cpu_quota=64))),
        lambda: look(nodes({"free_bytes": 60 * GIB}, {"free_bytes": 40 * GIB})),
        lambda: look(gpu(), mps=True, compute_modes={"0000:3b:00.0": "Exclusive_Process"}),
        lambda: look(replace(SOUND, policy=MemoryPolicy("local"))),
    ],
)
def test_what_hurts_nobody_is_not_told(planted):
    assert [finding for finding in planted().findings if finding.severity != "note"] == []


def test_the_worst_comes_first():
    diagnosis = look(kernel(numa_balancing=1, transparent_hugepage="never", governors=("powersave",)), environment={})
    assert [finding.severity for finding in diagnosis.findings] == ["hurts", "advice", "advice", "note"]


def test_a_dump_is_judged_without_trying_anything():
    circumstances = Circumstances.of(Platform.from_dump(TOPOLOGIES / "lab" / "cxl.tar.xz"))
    assert circumstances.backend is None and circumstances.refused is None and not circumstances.environment
    topics = {finding.topic for finding in diagnose(circumstances).findings}
    assert {"memory-less-nodes", "memory-only-nodes"} <= topics
    assert not topics & {"binding", "openmp-spinning", "backend"}


ANSWER = "00000000:3B:00.0, NVIDIA H100 80GB HBM3, 81559, Exclusive_Process\n"


def fake_nvidia_smi(folder, monkeypatch, script):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_memory_and_mode_of_nvidia_gpus_come_from_the_driver(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, f"echo '{ANSWER.strip()}'")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    circumstances = Circumstances.of(gpu(device="0x2330", memory_bytes=None))
    assert circumstances.platform.gpus[0].device == "H100 80GB HBM3"
    assert circumstances.platform.gpus[0].memory_bytes == 81559 << 20
    assert circumstances.compute_modes == {"0000:3b:00.0": "Exclusive_Process"}
    assert not circumstances.mps
    (tmp_path / "control").touch()
    assert Circumstances.of(gpu()).mps


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "echo 'a, b, c, d'", "printf '\\377'"])
def test_a_driver_that_tells_nothing(tmp_path, monkeypatch, script):
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    circumstances = Circumstances.of(gpu(memory_bytes=None))
    assert circumstances.platform.gpus[0].memory_bytes is None
    assert circumstances.compute_modes == {}


@pytest.fixture
def command():
    app = typer.Typer()
    doctor_command.register(app)
    app.command("other")(lambda: None)
    return lambda *arguments: CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "100"})


def test_command_on_a_dump(command):
    result = command("--fsroot", TOPOLOGIES / "hwloc" / "64amd64-4s2n4ca2co.tar.bz2")
    assert result.exit_code == 1  # no AVX2
    assert "4 sockets" in result.stdout
    assert "NPS2: 8 nodes on 4 sockets" in result.stdout
    assert "1 finding would hurt" in result.stdout
    assert command("--fsroot", TOPOLOGIES / "lab" / "2n2c.tar.xz").exit_code == 0


def test_command_json_can_be_replayed(command, tmp_path):
    result = command("--json", "--fsroot", TOPOLOGIES / "lab" / "8n1c.tar.xz")
    data = json.loads(result.stdout.splitlines()[-1])
    assert data["ok"] is True
    assert data["findings"] and set(data["findings"][0]) == {"severity", "topic", "found", "remedy"}
    saved = tmp_path / "machine.json"
    saved.write_text(result.stdout)
    again = command("--json", "--fsroot", saved)
    assert json.loads(again.stdout)["platform"]["nodes"] == data["platform"]["nodes"]


@pytest.mark.parametrize(
    ("refused", "words", "allowed"),
    [({}, "binding allowed (tried on one page)", True), ({"mbind": "EPERM"}, "refused: mbind: EPERM", False)],
)
def test_whether_binding_is_allowed_is_told(refused, words, allowed):
    from rich.console import Console

    diagnosis = look(refused=refused)
    console = Console(width=300)
    with console.capture() as captured:
        console.print(diagnosis)
    assert words in captured.get()
    assert json.loads(diagnosis.to_json())["binding_allowed"] is allowed


def test_command_here(command):
    result = command("--json")
    data = json.loads(result.stdout)
    assert data["platform"]["live"] is True
    assert data["backend"]["isa"] in data["backend"]["supported"]
    assert data["binding_allowed"] is ("mbind" not in data["refused"])
    assert result.exit_code == (0 if data["ok"] else 1)


@pytest.mark.parametrize(
    ("calls", "topics", "method"),
    [
        (
            ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "migrate_pages"),
            {"binding", "page-query"},
            "first touch",
        ),
        (("sched_setaffinity",), {"pinning"}, ""),
        ((), set(), ""),
    ],
    ids=["docker", "no pinning", "no filter"],
)
def test_under_a_real_filter(calls, topics, method):
    """In a child, since a filter stays."""
    code = f"""
import errno
from tests.native.seccomp import refuse
refuse({calls!r}, errno.EPERM) if {calls!r} else None
from numagraft.doctor import Circumstances, diagnose
from numagraft.platform import Platform
print(diagnose(Circumstances.of(Platform.detect())).to_json())
"""
    root = Path(__file__).resolve().parent.parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    data = json.loads(shown)
    found = {each["topic"]: each for each in data["findings"]}
    assert topics == {"binding", "page-query", "pinning"} & set(found)
    assert data["ok"] is False or "pinning" not in topics
    assert set(data["refused"]) == set(calls) - {"migrate_pages"}
    if method:
        assert method in found["binding"]["found"]
        assert data["platform"]["policy"] == {"mode": "unknown", "nodes": [], "note": "get_mempolicy: EPERM"}
