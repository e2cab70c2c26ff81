from __future__ import annotations

from dataclasses import replace

import pytest

from numagraft.errors import ConfigurationError
from numagraft.platform import Cgroup, Cpu, Node, Platform
from numagraft.runtime import RuntimeLayout, RuntimeSettings

GIB = 1 << 30


def platform(*, smt: int = 1, **changes) -> Platform:
    """Two sockets with two cores each; node 4 is CXL memory near socket 0, node 6 has CPUs but no memory."""
    cores = {0: (0, 1), 2: (2, 3), 6: (4, 5)}
    cpus = tuple(
        Cpu(core + 8 * thread, True, node, 0 if node == 0 else 1, core, core // 2)
        for thread in range(smt)
        for node, own in cores.items()
        for core in own
    )
    rows = {0: (10, 21, 14, 31), 2: (21, 10, 24, 12), 4: (14, 24, 10, 40), 6: (31, 12, 40, 10)}
    memory = {0: 8 * GIB, 2: 4 * GIB, 4: 16 * GIB, 6: 0}
    base = Platform(
        source="test",
        nodes=tuple(
            Node(
                id,
                tuple(cpu.id for cpu in cpus if cpu.node == id),
                0 if id in (0, 4) else 1,
                memory[id],
                memory[id],
                distances=dict(zip(rows, row, strict=True)),
            )
            for id, row in rows.items()
        ),
        cpus=cpus,
        allowed_cpus=tuple(cpu.id for cpu in cpus),
        allowed_nodes=(0, 2, 4),
        live=True,
    )
    return replace(base, **changes)


def test_nodes_with_cpus_and_memory_take_part():
    layout = RuntimeLayout.from_platform(platform())
    assert [(node.os_node, node.cpus, node.threads, node.socket) for node in layout.nodes] == [
        (0, (0, 1), 2, 0),
        (2, (2, 3), 2, 1),
    ]
    assert layout.nodes[1].free_bytes == 4 * GIB
    assert layout.distances == ((10, 21), (21, 10))
    assert layout.bound
    assert layout.notes == (
        "node 6 has no memory: its CPUs stay idle",
        "memory-only nodes 4 are used only when runtime.nodes lists them",
    )


def test_one_thread_per_core_and_siblings_last():
    (first, _) = RuntimeLayout.from_platform(platform(smt=2)).nodes
    assert first.cpus == (0, 1, 8, 9)
    assert first.threads == 2
    (first, _) = RuntimeLayout.from_platform(platform(smt=2), RuntimeSettings(threads_per_node=4)).nodes
    assert first.threads == 4


def test_few_threads_go_round_the_l3_groups():
    made = Platform.virtual(1, cores_per_node=8)
    chiplets = replace(made, cpus=tuple(replace(cpu, l3=cpu.id // 4 * 4) for cpu in made.cpus))
    layout = RuntimeLayout.from_platform(chiplets, RuntimeSettings(threads_per_node=2))
    assert layout.nodes[0].cpus[:2] == (0, 4)
    assert RuntimeLayout.from_platform(chiplets).nodes[0].cpus == tuple(range(8))


def test_memory_only_nodes_when_listed():
    layout = RuntimeLayout.from_platform(platform(), RuntimeSettings(nodes=(0, 4)))
    assert [(node.os_node, node.threads, node.cpus) for node in layout.nodes] == [(0, 2, (0, 1)), (4, 0, ())]
    assert layout.compute_nodes == (0,)
    assert layout.nearest_compute_nodes(1) == (0,)
    assert layout.index_of(4) == 1
    assert layout.index_of(2) is None


@pytest.mark.parametrize(
    ("nodes", "message", "hint"),
    [
        ((0, 9), "node 9 does not exist", "usable nodes: 0,2; memory-only nodes: 4"),
        ((6,), "node 6 has no memory", "usable nodes: 0,2"),
        ((4,), "nodes 4 have no CPUs", "list a node that computes too"),
        ((), "the list is empty", 'give "all"'),
        ((0, 0), "node 0 is listed 2 times", ""),
    ],
)
def test_nodes_that_cannot_be_used(nodes, message, hint):
    with pytest.raises(ConfigurationError) as caught:
        RuntimeLayout.from_platform(platform(), RuntimeSettings(nodes=nodes))
    (problem,) = caught.value.problems
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where == "runtime.nodes"


def test_all_bad_nodes_at_once():
    with pytest.raises(ConfigurationError) as caught:
        RuntimeLayout.from_platform(platform(allowed_nodes=(0,)), RuntimeSettings(nodes=(2, 6, 9)))
    assert [problem.message for problem in caught.value.problems] == [
        "node 2 is not allowed to this process (Mems_allowed: 0)",
        "node 6 has no memory",
        "node 9 does not exist",
    ]


def test_cpus_outside_the_affinity_mask():
    layout = RuntimeLayout.from_platform(platform(allowed_cpus=(1,)))
    assert [(node.os_node, node.cpus) for node in layout.nodes] == [(0, (1,))]
    with pytest.raises(ConfigurationError, match=r"none of node 2's CPUs \(2-3\) is allowed to this process \(1\)"):
        RuntimeLayout.from_platform(platform(allowed_cpus=(1,)), RuntimeSettings(nodes=(2,)))


def test_cpus_and_memory_on_different_nodes():
    """numactl --cpunodebind=2 --membind=0."""
    layout = RuntimeLayout.from_platform(platform(allowed_cpus=(2, 3), allowed_nodes=(0,)))
    assert [(node.os_node, node.cpus, node.threads) for node in layout.nodes] == [(0, (2, 3), 2)]
    assert "no allowed node has both CPUs and memory" in layout.notes[0]


@pytest.mark.parametrize("threads", [3, 100])
def test_more_threads_than_cpus(threads):
    with pytest.raises(ConfigurationError) as caught:
        RuntimeLayout.from_platform(platform(), RuntimeSettings(threads_per_node=threads))
    assert len(caught.value.problems) == 2
    assert f"{threads} threads asked for, but node 0 has 2 CPUs" in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5])
def test_thread_counts_that_are_none(threads):
    with pytest.raises(ConfigurationError, match="not a positive number"):
        RuntimeLayout.from_platform(platform(), RuntimeSettings(threads_per_node=threads))


def test_the_cpu_quota_limits_threads():
    layout = RuntimeLayout.from_platform(platform(cgroup=Cgroup(2, cpu_quota=3.5)))
    assert [node.threads for node in layout.nodes] == [2, 1]
    assert "pays for 3.5 CPUs: 3 threads instead of 4" in layout.notes[-1]
    enough = RuntimeLayout.from_platform(platform(cgroup=Cgroup(2, cpu_quota=4.0)))
    assert [node.threads for node in enough.nodes] == [2, 2]


@pytest.mark.parametrize("quota", [1.5, 0.2])
def test_a_quota_below_the_number_of_nodes_leaves_nodes_without_threads(quota):
    layout = RuntimeLayout.from_platform(platform(cgroup=Cgroup(1, cpu_quota=quota)))
    assert [(node.threads, node.cpus) for node in layout.nodes] == [(1, (0, 1)), (0, ())]
    assert layout.compute_nodes == (0,)
    assert "no thread for nodes 2" in layout.notes[-1]


def test_threads_beyond_the_quota_are_run_when_asked_for_and_told():
    layout = RuntimeLayout.from_platform(platform(cgroup=Cgroup(2, cpu_quota=3.5)), RuntimeSettings(threads_per_node=2))
    assert [node.threads for node in layout.nodes] == [2, 2]
    assert "pays for 3.5 CPUs: the 4 threads asked for" in layout.notes[-1]


def test_free_memory_is_cut_to_the_control_group():
    layout = RuntimeLayout.from_platform(platform(cgroup=Cgroup(2, memory_limit=3 * GIB, memory_used=GIB)))
    assert [node.free_bytes for node in layout.nodes] == [2 * GIB, 2 * GIB]


def test_a_replayed_platform_never_binds():
    assert not RuntimeLayout.from_platform(platform(live=False)).bound
    assert not RuntimeLayout.from_platform(Platform.from_json(platform().to_json())).bound


def test_this_machine():
    here = Platform.detect()
    layout = RuntimeLayout.from_platform(here)
    assert layout.bound
    assert sum(node.threads for node in layout.nodes) == len(here.cores())
    assert set(layout.nodes[0].cpus) <= set(here.allowed_cpus)
    assert all(node.free_bytes > 0 for node in layout.nodes)
