"""What machine the tests run on: the lab's topology where they run in the lab, the kernel's word elsewhere."""

from __future__ import annotations

import os

import pytest

from tests.lab.topologies import TOPOLOGIES, Node, Topology

from . import syscalls


def _this_machine() -> Topology:
    """A table entry for a real machine with several nodes; it serves the tests that need nothing more."""
    online = syscalls.parse_list((syscalls.NODES / "online").read_text())
    nodes = []
    for i in range(max(online) + 1):
        cpus = syscalls.parse_list((syscalls.NODES / f"node{i}/cpulist").read_text()) if i in online else ()
        memory = syscalls.node_free(i) if i in online else 0
        nodes.append(Node(cpus=len(cpus), mib=memory >> 20, present=i in online))
    return Topology("this-machine", "not the lab", tuple(nodes))


@pytest.fixture(scope="session")
def topology() -> Topology:
    """What the machine is meant to be. Tests that read facts other than node ids from it take `lab` instead."""
    name = os.environ.get("NUMAGRAFT_LAB")
    return TOPOLOGIES[name] if name else _this_machine()


@pytest.fixture(scope="session")
def lab(topology: Topology) -> Topology:
    """The lab's topology; skips elsewhere (the test depends on its exact shape or harms a machine in use)."""
    if "NUMAGRAFT_LAB" not in os.environ:
        pytest.skip("runs in the lab only (make lab)")
    return topology


@pytest.fixture(scope="session")
def online() -> tuple[int, ...]:
    return syscalls.parse_list((syscalls.NODES / "online").read_text())


@pytest.fixture(scope="session")
def memory_nodes() -> tuple[int, ...]:
    """Kernel ids of the nodes that have memory."""
    return syscalls.parse_list((syscalls.NODES / "has_memory").read_text())


@pytest.fixture(scope="session")
def usable_nodes(memory_nodes) -> tuple[int, ...]:
    """Kernel ids of the nodes that have memory and CPUs."""
    return tuple(n for n in syscalls.parse_list((syscalls.NODES / "has_cpu").read_text()) if n in memory_nodes)


@pytest.fixture(scope="session")
def full_nodes(usable_nodes) -> tuple[int, ...]:
    """The same, where there are two at least; skips elsewhere."""
    if len(usable_nodes) < 2:
        pytest.skip("fewer than two nodes with memory and CPUs")
    return usable_nodes


@pytest.fixture(autouse=True)
def _caller_unchanged():
    """No test may leave this thread pinned or under a policy: the next one would measure that instead."""
    affinity, policy = os.sched_getaffinity(0), syscalls.get_mempolicy()
    yield
    after = os.sched_getaffinity(0), syscalls.get_mempolicy()
    if after != (affinity, policy):
        os.sched_setaffinity(0, affinity)
        syscalls.set_mempolicy(syscalls.DEFAULT)
        pytest.fail(f"affinity and policy were {affinity}, {policy} before the test and {after} after it")
