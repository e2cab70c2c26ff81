"""What a mirror buys: prefill divided over nodes, chunks taken from a late node, two callers at once. Virtual nodes here;
tests/numa/test_mirror.py asks a kernel with real ones."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_operands import EXPERTS_BAR, ISAS, LINEAR_BAR, error, matrix, parts, runtime

from numagraft import native
from numagraft.errors import PlacementError
from numagraft.native import ExpertsWeights, Gate, LinearWeights, WeightFormat
from numagraft.placement import Part
from numagraft.runtime import RuntimeLayout

HIDDEN, INNER, EXPERTS, SLOTS = 128, 160, 6, 2
OUT, IN = 200, 192
LEASE_KEPT_S = 0.1


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Linear:
    bar = LINEAR_BAR

    def __init__(self, runtime, format="int8", placed=None, out=OUT, isa=None):
        self.runtime, self.out = runtime, out
        nodes = len(runtime.layout.nodes)
        self.weights = LinearWeights(
            runtime,
            out_features=out,
            in_features=IN,
            format=WeightFormat(format),
            parts=placed or parts("mirror" if nodes > 1 else "bind", nodes, out),
            has_bias=True,
            owner="layer",
            isa=isa,
        )
        self.weights.load_weight(matrix(gaussian(1, out, IN)))
        self.weights.load_bias(matrix(gaussian(2, 1, out)))

    def __call__(self, tokens, seed=0):
        x, out = gaussian(seed, tokens, IN), np.full((tokens, self.out), 77, np.float32)
        self.weights.forward(matrix(x), matrix(out))
        return out


class Experts:
    bar = EXPERTS_BAR

    def __init__(self, runtime, format="int8", placed=None, isa=None):
        self.runtime = runtime
        nodes = len(runtime.layout.nodes)
        self.weights = ExpertsWeights(
            runtime,
            experts=EXPERTS,
            hidden=HIDDEN,
            intermediate=INNER,
            format=WeightFormat(format),
            gate=Gate("silu"),
            parts=placed or parts("mirror" if nodes > 1 else "bind", nodes, INNER),
            has_bias=False,
            owner="experts",
            isa=isa,
        )
        self.weights.load_experts(
            gate=[matrix(gaussian(10 + e, INNER, HIDDEN)) for e in range(EXPERTS)],
            up=[matrix(gaussian(20 + e, INNER, HIDDEN)) for e in range(EXPERTS)],
            down=[matrix(gaussian(30 + e, HIDDEN, INNER)) for e in range(EXPERTS)],
        )

    def __call__(self, tokens, seed=0, *, skip_all=False):
        rng = np.random.default_rng(seed)
        x, out = gaussian(seed, tokens, HIDDEN), np.full((tokens, HIDDEN), 77, np.float32)
        # EXPERTS itself is a legal skip;
        # held here, since with two callers, `matrix` keeps the last few arrays of both
        ids = rng.integers(EXPERTS if skip_all else 0, EXPERTS + 1, (tokens, SLOTS)).astype(np.int64)
        shares = rng.random((tokens, SLOTS)).astype(np.float32)
        self.weights.forward(matrix(x), matrix(ids), matrix(shares), matrix(out))
        return out


KINDS = [Linear, Experts]


def since(before, after):
    return [now - then for now, then in zip(after.nodes, before.nodes, strict=True)]


def counted(layer, tokens):
    before = layer.weights.stats()
    out = layer(tokens)
    return out, since(before, layer.weights.stats())


def check_output(kind, format, found, expected):
    if kind is Linear:
        np.testing.assert_array_equal(found, expected)  # chunks divide rows and columns, never a sum
    else:
        assert error(found, expected) <= kind.bar[format]  # tiles or not depends on how many rows an expert has here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("nodes", [2, 3])
def test_a_prefill_is_divided_over_the_nodes(kind, format, nodes):
    mirrored, single = kind(runtime(nodes, 2), format), kind(runtime(1, 2), format)
    mirrored.runtime.native.set_stealing(False)
    for tokens in (32 * nodes, 150, 400):
        found, by_node = counted(mirrored, tokens)
        check_output(kind, format, found, single(tokens))
        assert all(node.calls == 1 and node.chunks > 0 and node.bytes_read > 0 for node in by_node)
        assert max(n.chunks for n in by_node) <= 2 * min(n.chunks for n in by_node)
        assert all(node.stolen_chunks == node.off_node_chunks == node.remote_bytes == 0 for node in by_node)
    # the control: one token is not divided in chunks, and one copy never
    assert all(node.chunks == 0 and node.calls == 1 for node in counted(mirrored, 1)[1])
    assert counted(single, 400)[1][0].chunks == 0


@settings(max_examples=25, deadline=None)
@given(
    nodes=st.integers(2, 4),
    threads=st.integers(1, 3),
    tokens=st.integers(64, 300),
    late=st.integers(0, 3),
    steal=st.booleans(),
)
def test_whoever_takes_which_chunk_the_output_is_the_same(nodes, threads, tokens, late, steal):
    for kind in KINDS:
        mirrored = kind(runtime(nodes, threads))
        mirrored.runtime.native.set_stealing(steal)
        mirrored.runtime.native.set_chunk_delay(late % nodes, 200)
        check_output(kind, "int8", mirrored(tokens, seed=tokens), kind(runtime(1, 1))(tokens, seed=tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_node_is_helped_by_the_others_from_their_own_copies(kind):
    mirrored = kind(runtime(2, 2))
    expected = mirrored(256)
    native_runtime = mirrored.runtime.native
    chunks = []
    for steal in (False, True):
        native_runtime.set_stealing(steal)
        native_runtime.set_chunk_delay(1, 10_000)
        begin = time.monotonic()
        found, (prompt, late) = counted(mirrored, 256)
        seconds = time.monotonic() - begin
        chunks.append((prompt.chunks, late.chunks, prompt.stolen_chunks, seconds))
        np.testing.assert_array_equal(found, expected)
        assert prompt.chunks + late.chunks == sum(chunks[0][:2])  # every chunk exactly once
        assert late.stolen_chunks <= prompt.stolen_chunks
    without, with_stealing = chunks
    assert without[2] == 0  # the control: each computes its own share
    assert with_stealing[2] > 0
    assert with_stealing[0] > without[0] and with_stealing[1] < without[1]
    assert with_stealing[3] < without[3]


@pytest.mark.skipif("avx2" not in ISAS, reason="this CPU has no AVX2")
@pytest.mark.parametrize(("kind", "size"), [(Linear, {"out": 1600}), (Experts, {})])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_late_node_leaves_the_last_panels_of_few_tokens_to_the_others(kind, size, tokens):
    for order in ("in-order", "in-turn"):
        mirrored = kind(runtime(2, 1), isa=f"avx2:{order}", **size)
        expected = mirrored(tokens)
        for late in (0, 1):
            for node in (0, 1):
                mirrored.runtime.native.set_chunk_delay(node, 20_000 if node == late else 0)
            found, by_node = counted(mirrored, tokens)
            np.testing.assert_array_equal(found, expected)
            read = [node.bytes_read for node in by_node]
            if order == "in-order":
                assert 0 < read[late] < read[1 - late]
            else:  # the control: divided beforehand
                assert read[0] == read[1]


def test_tokens_that_choose_no_expert():
    mirrored = Experts(runtime(2, 2))
    assert not mirrored(100, skip_all=True).any()
    assert not mirrored(1, skip_all=True).any()


def test_uneven_nodes_get_rows_by_their_threads():
    layout_nodes = runtime(2).layout.nodes
    uneven = native.Runtime(RuntimeLayout((replace(layout_nodes[0], threads=3), layout_nodes[1]), bound=False))
    uneven.native.set_stealing(False)
    layer = Linear(uneven)
    _, (three, one) = counted(layer, 1024)
    assert 2.5 < three.chunks / one.chunks < 3.5
    np.testing.assert_array_equal(layer(100), Linear(runtime())(100))


def test_replicas_on_several_nodes_each():
    """`per: socket`: two replicas, each computed by two nodes."""
    placed = tuple(Part(nodes, True, nodes, 0, OUT) for nodes in ((0, 1), (2, 3)))
    sockets, single = Linear(runtime(4), placed=placed), Linear(runtime())
    for tokens in (1, 5, 100, 500):
        found, by_node = counted(sockets, tokens)
        np.testing.assert_array_equal(found, single(tokens))
        assert all(node.calls == 1 for node in by_node)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steal", [True, False])
def test_a_chunk_that_fails_reaches_the_caller_and_nobody_waits_for_it(kind, steal):
    mirrored = kind(runtime(2, 2))
    mirrored.runtime.native.set_stealing(steal)
    native.plant_available(0)
    try:
        with pytest.raises(PlacementError):
            mirrored(300)
    finally:
        native.plant_available(None)
    check_output(kind, "int8", mirrored(300), kind(runtime())(300))


# ---- callers


def held_at_once(layout_runtime, groups, callers, *, seconds=0.15, repeat=1):
    """What each of several threads got, and when: [(groups, begin, end)] per caller."""
    found = [[] for _ in range(callers)]
    start = threading.Barrier(callers)

    def call(index):
        start.wait()
        for _ in range(repeat):
            found[index].append(layout_runtime.native.hold_lease(groups, seconds))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def overlap(a, b):
    return min(a[2], b[2]) - max(a[1], b[1])


def test_a_lone_caller_gets_every_node():
    r = runtime(3)
    for _ in range(3):
        assert r.native.hold_lease([[0], [1], [2]], 0.0)[0] == [0, 1, 2]


def shared(one, two):
    """Whoever came first may have had both nodes once; from then on each has its own, and nobody waits."""
    return (
        {tuple(lease[0]) for lease in one[1:]} | {tuple(lease[0]) for lease in two[1:]} == {(0,), (1,)}
        and len({tuple(lease[0]) for lease in one[1:]}) == 1
        and all(later[1] - earlier[2] < 0.1 for mine in (one, two) for earlier, later in pairwise(mine))
        # four calls of 0.15 s, and one of them may have come while the other's first call had both nodes
        and max(one[-1][2], two[-1][2]) - min(one[0][1], two[0][1]) < 5.9 * 0.15
    )


def test_two_callers_share_the_nodes_and_do_not_wait():
    r = runtime(2)
    # a pause of the whole machine outlasts what is kept for a caller: one of three tries has none
    assert any(shared(*held_at_once(r, [[0], [1]], 2, repeat=4)) for _ in range(3))
    time.sleep(LEASE_KEPT_S * 1.5)
    assert r.native.hold_lease([[0], [1]], 0.0)[0] == [0, 1]  # alone again


def test_the_control_two_callers_of_one_node_wait_for_each_other():
    one, two = held_at_once(runtime(1), [[0]], 2)
    assert overlap(one[0], two[0]) <= 0


def test_four_nodes_are_divided_among_the_callers():
    r = runtime(4)
    groups = [[0], [1], [2], [3]]
    one, two = held_at_once(r, groups, 2, repeat=4)
    assert sorted(one[1][0] + two[1][0]) == [0, 1, 2, 3]
    assert len(one[1][0]) == 2
    five = held_at_once(r, groups, 5, seconds=0.05, repeat=4)
    assert all(lease[0] for caller in five for lease in caller)  # more callers than nodes: they queue, none starves


def test_a_group_of_two_nodes_is_held_whole():
    r = runtime(4)
    one, two = held_at_once(r, [[0, 1], [2, 3]], 2, repeat=3)
    assert sorted(one[1][0] + two[1][0]) == [0, 1]


def test_calls_on_every_node_and_leases_get_along():
    """A call that needs certain nodes queues with those that take whichever is free."""
    r = runtime(2, 2)
    layer = Linear(r)
    expected = layer(100)
    stop = threading.Event()

    def everywhere():
        while not stop.is_set():
            assert r.native.barriers_hold([0, 1], 3)

    threads = [threading.Thread(target=everywhere) for _ in range(2)]
    for thread in threads:
        thread.start()
    for tokens in (1, 100) * 20:
        np.testing.assert_array_equal(layer(tokens), expected[:tokens] if tokens == 100 else layer(1))
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_two_callers_of_one_mirror_are_both_right_and_served_side_by_side(kind):
    mirrored, single = kind(runtime(2, 1)), kind(runtime(1, 1))
    mirrored.runtime.native.set_chunk_delay(0, 0)
    cases = [(1, 3), (2, 4), (40, 5), (100, 6), (200, 7)]
    expected = {case: single(*case) for case in cases}
    wrong = []
    start = threading.Barrier(2)

    def caller():
        start.wait()
        for _ in range(20):
            for case in cases:
                found = mirrored(*case)
                if error(found, expected[case]) > kind.bar["int8"]:
                    wrong.append(case)

    def side_by_side():
        before = mirrored.weights.stats()
        threads = [threading.Thread(target=caller) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = mirrored.weights.stats()
        assert not wrong
        calls = after.calls - before.calls
        nodes = since(before, after)
        assert calls == 2 * 20 * len(cases)
        # most calls ran on one node: were both on every call, each node would count all of them
        return sum(node.calls for node in nodes) < 1.5 * calls and min(node.calls for node in nodes) > 0.2 * calls

    # where other work keeps one caller from the CPU for long, the other rightly takes both nodes: one of three tries has none
    assert any(side_by_side() for _ in range(3))
