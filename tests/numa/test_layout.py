"""Which nodes and CPUs a runtime takes on machines whose shape is known, and what it refuses."""

from __future__ import annotations

import os

import pytest

from numagraft.errors import ConfigurationError
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout, RuntimeSettings

from .control_groups import control_group, join
from .syscalls import in_child

pytestmark = pytest.mark.numa


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform.detect()


def layout_of(settings: RuntimeSettings | None = None) -> RuntimeLayout:
    return RuntimeLayout.from_platform(Platform.detect(), settings)


def test_every_node_with_cpus_and_memory_is_used_once(lab, platform):
    layout = RuntimeLayout.from_platform(platform)
    usable = [n for n in lab.with_memory if n in lab.with_cpus]
    assert layout.bound
    assert [node.os_node for node in layout.nodes] == usable
    for node in layout.nodes:
        cores = {lab.siblings_of(cpu) for cpu in lab.cpus_of(node.os_node)}
        assert node.threads == len(cores), "one thread for each physical core"
        assert {lab.siblings_of(cpu) for cpu in node.cpus[: node.threads]} == cores, "no core twice"
        assert set(node.cpus) == set(lab.cpus_of(node.os_node))
        assert node.socket == lab.socket_of(node.os_node)
        assert 0 < node.free_bytes <= node.total_bytes
    assert layout.distances == tuple(tuple(lab.distance(a, b) for b in usable) for a in usable)


def test_nodes_left_out_are_said(lab, platform):
    notes = " ".join(RuntimeLayout.from_platform(platform).notes)
    for node in lab.with_cpus:
        if node not in lab.with_memory:
            assert f"node {node} has no memory" in notes
    for node in lab.with_memory:
        if node not in lab.with_cpus:
            assert f"memory-only nodes {node}" in notes


def test_a_memory_only_node_is_used_when_listed(lab, platform):
    memory_only = [node for node in lab.with_memory if node not in lab.with_cpus]
    if not memory_only:
        pytest.skip("this topology has no memory-only node")
    listed = RuntimeLayout.from_platform(platform, RuntimeSettings(nodes=lab.with_memory))
    by_id = {node.os_node: node for node in listed.nodes}
    assert tuple(by_id) == lab.with_memory
    assert all(by_id[node].threads == 0 and by_id[node].cpus == () for node in memory_only)


def test_nodes_that_are_not_there_are_refused_by_name(lab, platform):
    absent = max(lab.online) + 7
    holes = [node for node in range(max(lab.online)) if node not in lab.online]
    asked = (*lab.with_memory[:1], *holes[:1], absent)
    with pytest.raises(ConfigurationError, match=f"node {absent} does not exist") as refusal:
        RuntimeLayout.from_platform(platform, RuntimeSettings(nodes=asked))
    assert len(refusal.value.problems) == len(asked) - 1, "every offender at once, and only those"


def test_a_memory_less_node_is_refused_by_name(lab, platform):
    empty = [node for node in lab.with_cpus if node not in lab.with_memory]
    if not empty:
        pytest.skip("this topology has no memory-less node")
    with pytest.raises(ConfigurationError, match=f"node {empty[0]} has no memory"):
        RuntimeLayout.from_platform(platform, RuntimeSettings(nodes=(0, *empty)))


def test_threads_may_fill_the_siblings_but_no_more(lab, platform):
    usable = [n for n in lab.with_memory if n in lab.with_cpus]
    most = min(len(lab.cpus_of(node)) for node in usable)
    full = RuntimeLayout.from_platform(platform, RuntimeSettings(threads_per_node=most))
    for node in full.nodes:
        assert len(set(node.cpus[: node.threads])) == most
    with pytest.raises(ConfigurationError, match=f"{most + 5} threads asked for"):
        RuntimeLayout.from_platform(platform, RuntimeSettings(threads_per_node=most + 5))


def test_an_affinity_mask_is_kept_to(topology, full_nodes):
    first, last = full_nodes[0], full_nodes[-1]
    cpus = (topology.cpus_of(first)[-1], topology.cpus_of(last)[0])

    def narrowed() -> RuntimeLayout:
        os.sched_setaffinity(0, cpus)
        return layout_of()

    layout = in_child(narrowed)
    assert {node.os_node: node.cpus for node in layout.nodes} == {first: cpus[:1], last: cpus[1:]}
    assert [node.threads for node in layout.nodes] == [1, 1]


def test_a_node_whose_cpus_are_all_masked_is_not_used(topology, full_nodes):
    node = full_nodes[-1]

    def narrowed() -> RuntimeLayout:
        os.sched_setaffinity(0, topology.cpus_of(node))
        return layout_of()

    assert [n.os_node for n in in_child(narrowed).nodes] == [node]

    def asked_for() -> RuntimeLayout:
        os.sched_setaffinity(0, topology.cpus_of(node))
        return layout_of(RuntimeSettings(nodes=full_nodes))

    with pytest.raises(ConfigurationError, match=f"none of node {full_nodes[0]}'s CPUs"):
        in_child(asked_for)


def test_a_cpuset_without_a_node_refuses_that_node_by_name(lab, full_nodes):
    kept, lost = full_nodes[0], full_nodes[-1]

    def all_nodes() -> RuntimeLayout:
        join(group)
        return layout_of()

    def both() -> RuntimeLayout:
        join(group)
        return layout_of(RuntimeSettings(nodes=(kept, lost)))

    with control_group("narrow", cpuset_mems=str(kept)) as group:
        layout = in_child(all_nodes)
        assert [node.os_node for node in layout.nodes] == [kept]
        assert f"node {lost}" in " ".join(layout.notes)
        with pytest.raises(ConfigurationError, match=f"node {lost} is not allowed to this process"):
            in_child(both)
