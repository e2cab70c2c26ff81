"""What a mirror buys, on a kernel with several nodes: who computed what, from whose memory, and two callers at once."""

from __future__ import annotations

import os
import threading
import time
from array import array

import pytest

from numagraft import native
from numagraft.placement import PlacementSpec
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout

from . import syscalls, weights
from .weights import KINDS, difference, place

pytestmark = pytest.mark.numa

TOKENS = 256


@pytest.fixture(scope="module")
def runtime() -> native.Runtime:
    return native.Runtime(RuntimeLayout.from_platform(Platform.detect()))


@pytest.fixture(autouse=True)
def _nothing_planted(runtime):
    yield
    runtime.native.set_stealing(True)
    for index in range(len(runtime.layout.nodes)):
        runtime.native.set_chunk_delay(index, 0)


def mirrored(runtime, kind, format="int8"):
    packed, placement = place(runtime, kind, format, PlacementSpec("mirror"))
    assert placement.policy == "mirror"
    counts = runtime.verify(packed.weights.buffers())
    for part, count in zip(placement.parts, counts, strict=True):
        (index,) = part.memory_nodes
        assert count.exact and set(count.per_node) == {runtime.layout.nodes[index].os_node}
    return packed


def forward(packed, tokens: int) -> tuple[array, list[native.NodeStats]]:
    before = packed.weights.stats()
    out = packed.forward(tokens)
    after = packed.weights.stats()
    assert after.remote_bytes == 0  # of verified replicas
    return out, [now - then for now, then in zip(after.nodes, before.nodes, strict=True)]


def one_copy(runtime, kind, tokens: int) -> array:
    packed, _ = place(runtime, kind, "int8", PlacementSpec("bind", nodes=(runtime.layout.nodes[0].os_node,)))
    return packed.forward(tokens)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_node_computes_its_share_of_a_prefill_from_its_own_copy(runtime, full_nodes, kind):
    packed = mirrored(runtime, kind)
    runtime.native.set_stealing(False)
    packed.forward(TOKENS)
    out, nodes = forward(packed, TOKENS)
    for node in nodes:
        assert node.calls == 1 and node.chunks > 0 and node.bytes_read > 0
        assert node.remote_bytes == node.off_node_chunks == node.stolen_chunks == 0
    assert max(node.chunks for node in nodes) <= 2 * min(node.chunks for node in nodes)
    assert difference(out, one_copy(runtime, kind, TOKENS)) < 0.02


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_late_node_is_helped_and_no_byte_of_weights_is_remote(runtime, full_nodes, kind):
    packed = mirrored(runtime, kind)
    expected = packed.forward(TOKENS)
    late = len(runtime.layout.nodes) - 1
    runtime.native.set_chunk_delay(late, 30_000)
    shares = []
    for steal in (False, True):
        runtime.native.set_stealing(steal)
        out, nodes = forward(packed, TOKENS)
        assert difference(out, expected) < 1e-6
        assert all(node.remote_bytes == node.off_node_chunks == 0 for node in nodes)
        shares.append(nodes)
    without, stealing = shares
    assert sum(node.stolen_chunks for node in without) == 0  # the control
    assert sum(node.stolen_chunks for node in stealing) > 0
    assert stealing[late].chunks < without[late].chunks
    assert sum(node.chunks for node in stealing) == sum(node.chunks for node in without)


def test_a_node_whose_cpus_are_busy_with_something_else_is_helped(runtime, full_nodes):
    """The same without anything planted in numagraft: other threads spin on every CPU of one node."""
    packed = mirrored(runtime, weights.Linear)
    packed.forward(TOKENS)
    late = len(runtime.layout.nodes) - 1
    stop = os.path.join("/tmp", f"numagraft-spin-{os.getpid()}")
    spinners = []
    for cpu in runtime.layout.nodes[late].cpus[: runtime.layout.nodes[late].threads]:
        for _ in range(4):
            child = os.fork()
            if child == 0:
                os.sched_setaffinity(0, {cpu})
                while not os.path.exists(stop):
                    sum(range(20000))
                os._exit(0)
            spinners.append(child)
    try:
        time.sleep(0.2)
        stolen = own = 0
        for _ in range(20):
            _, nodes = forward(packed, 2 * TOKENS)
            stolen += sum(node.stolen_chunks for index, node in enumerate(nodes) if index != late)
            own += nodes[late].chunks
            assert all(node.remote_bytes == node.off_node_chunks == 0 for node in nodes)
    finally:
        with open(stop, "w"):
            pass
        for child in spinners:
            os.waitpid(child, 0)
        os.unlink(stop)
    assert stolen > 0
    assert stolen > own / 4


def test_a_caller_on_a_nodes_cpus_is_served_by_that_node(runtime, full_nodes, topology):
    """Its thread is confined to the node: one Python thread per node then, each with the node for itself."""
    packed = mirrored(runtime, weights.Linear)
    for index, node in enumerate(runtime.layout.nodes):
        with syscalls.pinned(topology.cpus_of(node.os_node)):
            for tokens in (1, 3, TOKENS):
                _, nodes = forward(packed, tokens)
                assert [each.calls for each in nodes] == [int(other == index) for other in range(len(nodes))]
    time.sleep(0.15)
    _, nodes = forward(packed, TOKENS)  # the control: anywhere, every node helps
    assert all(each.calls == 1 for each in nodes)


def test_two_callers_of_one_mirror_are_served_at_once_each_on_its_own_node(runtime, full_nodes):
    packed = mirrored(runtime, weights.Linear)
    expected = {tokens: packed.forward(tokens) for tokens in (1, 40, TOKENS)}
    time.sleep(0.15)
    before = packed.weights.stats()
    wrong: list[int] = []
    start = threading.Barrier(2)

    def caller() -> None:
        start.wait()
        for _ in range(15):
            wrong.extend(tokens for tokens, out in expected.items() if packed.forward(tokens) != out)

    threads = [threading.Thread(target=caller) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = packed.weights.stats()
    assert not wrong
    nodes = [now - then for now, then in zip(after.nodes, before.nodes, strict=True)]
    calls = after.calls - before.calls
    assert calls == 2 * 15 * len(expected)
    # on every call all nodes, each would count them all
    assert sum(node.calls for node in nodes) < 0.8 * calls * len(nodes)
    assert all(node.calls > 0 and node.remote_bytes == node.off_node_chunks == 0 for node in nodes)


def test_neither_of_two_callers_waits_for_the_other(runtime, full_nodes):
    groups = [[index] for index in range(len(runtime.layout.nodes))]
    found: list[list[tuple[list[int], float, float]]] = [[], []]
    start = threading.Barrier(2)

    def caller(mine: list) -> None:
        start.wait()
        for _ in range(3):
            mine.append(runtime.native.hold_lease(groups, 0.5))

    threads = [threading.Thread(target=caller, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    at_once = [
        (one, two) for one in found[0] for two in found[1] if min(one[2], two[2]) - max(one[1], two[1]) > 0.2
    ]  # from their first calls on, or from when the first caller's first call was over
    assert at_once
    assert not any(set(one[0]) & set(two[0]) for one, two in at_once)  # each its own nodes
    time.sleep(0.2)
    assert runtime.native.hold_lease(groups, 0.0)[0] == list(range(len(groups)))  # alone again: every node
