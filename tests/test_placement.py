from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numagraft.errors import ConfigurationError
from numagraft.placement import Part, PlacementSpec, Placer, parse, placed_bytes, resolve, split_units
from numagraft.runtime import RuntimeLayout, RuntimeNode

GIB = 1 << 30


@dataclass(frozen=True)
class Units:
    count: int
    multiple: int = 16
    packed_bytes: int = 1 << 26


def layout(
    *nodes: tuple[int, int, int], free: int = 64 * GIB, distances: tuple[tuple[int, ...], ...] = ()
) -> RuntimeLayout:
    """Nodes as (kernel id, threads, socket)."""
    return RuntimeLayout(
        tuple(
            RuntimeNode(id, tuple(range(id * 100, id * 100 + threads)), threads, socket, free, free)
            for id, threads, socket in nodes
        ),
        distances=distances,
    )


TWO = layout((0, 8, 0), (1, 8, 1))
SPARSE = layout((0, 4, 0), (2, 4, 0), (5, 4, 1), (7, 4, 1))


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        ("mirror", PlacementSpec("mirror")),
        ({}, PlacementSpec("auto")),
        ({"policy": "bind", "nodes": [2, 0]}, PlacementSpec("bind", (0, 2))),
        ({"policy": "shard", "nodes": "all"}, PlacementSpec("shard")),
        (
            {"policy": "mirror", "nodes": [0, 2], "per": "socket", "budget": "64GiB"},
            PlacementSpec("mirror", (0, 2), "socket", 64 * GIB),
        ),
        ({"policy": "mirror", "budget": 123}, PlacementSpec("mirror", budget=123)),
        ({"policy": "mirror", "budget": "1.5 GB"}, PlacementSpec("mirror", budget=1_500_000_000)),
        (PlacementSpec("shard"), PlacementSpec("shard")),
    ],
)
def test_parse(value, spec):
    assert parse(value) == spec


@pytest.mark.parametrize(
    ("value", "found", "hint"),
    [
        ("miror", "unknown policy 'miror'", "did you mean mirror?"),
        (True, "found True", "expected one of auto, shard"),
        ({"polcy": "mirror"}, "unknown key", "did you mean policy?"),
        ({"policy": "mirror", "nodes": [0, -1]}, "found -1 in the list", "expected a list of node numbers"),
        ({"policy": "mirror", "nodes": []}, "found []", "expected a list"),
        ({"policy": "mirror", "nodes": [True]}, "found True in the list", "expected a list"),
        ({"policy": "mirror", "nodes": "0-3"}, "found '0-3'", "expected a list"),
        ({"policy": "mirror", "nodes": [1, 1]}, "node 1 is listed more than once", "list every node once"),
        ({"policy": "mirror", "per": "core"}, "found 'core'", 'expected "node" or "socket"'),
        ({"policy": "shard", "per": "socket"}, "has no meaning for shard", "only mirrors"),
        ({"policy": "mirror", "budget": "64 gigs"}, "'64 gigs' is no size", ""),
        ({"policy": "mirror", "budget": -1}, "-1 is negative", ""),
        ({"policy": "interleave", "budget": "1GiB"}, "has no meaning for interleave", "remove it"),
    ],
)
def test_parse_errors_say_found_and_expected(value, found, hint):
    with pytest.raises(ConfigurationError) as caught:
        parse(value, where="rules.yaml:3:5: placement")
    (problem,) = caught.value.problems
    assert found in problem.message
    assert hint in problem.hint
    assert problem.where.startswith("rules.yaml:3:5: placement")


def test_parse_reports_every_problem_at_once():
    with pytest.raises(ConfigurationError) as caught:
        parse({"policy": "x", "nodes": 3, "per": 1, "budget": "y", "zzz": 0})
    assert len(caught.value.problems) == 5


def test_shard_splits_at_multiples():
    placement = resolve(PlacementSpec("shard"), Units(100, 16), TWO)
    assert placement.parts == (Part((0,), False, (0,), 0, 64), Part((1,), False, (1,), 64, 100))
    assert placement.replicas == 1


def test_shard_follows_threads():
    parts = resolve(PlacementSpec("shard"), Units(160, 16), layout((0, 8, 0), (1, 2, 1))).parts
    assert [(part.begin, part.end) for part in parts] == [(0, 128), (128, 160)]


def test_shard_leaves_nodes_empty_rather_than_refuse():
    placement = resolve(PlacementSpec("shard"), Units(20, 16), SPARSE)
    assert [part.memory_nodes for part in placement.parts] == [(0,), (1,)]
    assert "leave 2 of 4 nodes empty" in placement.reason


@given(
    count=st.integers(0, 100_000),
    multiple=st.integers(1, 512),
    weights=st.lists(st.integers(0, 200), min_size=1, max_size=16).filter(any),
)
def test_split_covers_every_unit_once_at_multiples(count, multiple, weights):
    bounds = split_units(count, multiple, weights)
    assert len(bounds) == len(weights)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == count
    for (begin, end), (after, _) in zip(bounds, [*bounds[1:], (count, count)], strict=True):
        assert begin <= end == after
        assert begin % multiple == 0 or begin == count
    # No weight is more than one block away from its exact share.
    blocks = -(-count // multiple)
    for (begin, end), weight in zip(bounds, weights, strict=True):
        assert abs(-(-(end - begin) // multiple) - blocks * weight / sum(weights)) <= 1


@pytest.mark.parametrize(
    ("count", "multiple", "weights"), [(-1, 1, [1]), (4, 0, [1]), (4, 1, []), (4, 1, [0]), (4, 1, [-1, 2])]
)
def test_split_refuses_nonsense(count, multiple, weights):
    with pytest.raises(ValueError, match="cannot split"):
        split_units(count, multiple, weights)


def test_mirror_per_node():
    placement = resolve(PlacementSpec("mirror"), Units(64), SPARSE)
    assert placement.parts == tuple(Part((i,), False, (i,), 0, 64) for i in range(4))
    assert placement.replicas == 4
    assert "nothing here gains from copies" in placement.reason


def test_mirror_per_socket_holds_one_copy_over_its_nodes():
    placement = resolve(PlacementSpec("mirror", per="socket"), Units(64), SPARSE)
    assert placement.parts == (Part((0, 1), True, (0, 1), 0, 64), Part((2, 3), True, (2, 3), 0, 64))
    assert placement.replicas == 2
    assert placed_bytes(placement, 1000) == {0: 500, 1: 500, 2: 500, 3: 500}


def test_nodes_are_kernel_ids():
    placement = resolve(PlacementSpec("mirror", nodes=(2, 7)), Units(64), SPARSE)
    assert [part.memory_nodes for part in placement.parts] == [(1,), (3,)]
    assert resolve(PlacementSpec("bind", nodes=(5,)), Units(64), SPARSE).parts == (Part((2,), False, (2,), 0, 64),)


def test_interleave_is_one_copy_for_all_threads():
    assert resolve(PlacementSpec("interleave"), Units(64), TWO).parts == (Part((0, 1), True, (0, 1), 0, 64),)


def test_nodes_that_cannot_be_had_are_all_named():
    with pytest.raises(ConfigurationError) as caught:
        resolve(PlacementSpec("mirror", nodes=(1, 2, 9)), Units(64), SPARSE, where="rules[experts].placement")
    assert [problem.message for problem in caught.value.problems] == [
        "node 1 is not among the runtime's nodes",
        "node 9 is not among the runtime's nodes",
    ]
    assert "the runtime has nodes 0,2,5,7" in str(caught.value)


def test_a_node_without_memory_is_refused():
    bare = RuntimeLayout((RuntimeNode(0, (0,), 1, 0, GIB, GIB), RuntimeNode(1, (1,), 1, 1, 0, 0)))
    with pytest.raises(ConfigurationError, match="node 1 has no memory"):
        resolve(PlacementSpec("bind", nodes=(1,)), Units(64), bare)


def test_memory_only_nodes_are_computed_by_the_nearest():
    # Two sockets, each with an HBM node that has no CPUs.
    hbm = layout(
        (0, 8, 0),
        (1, 8, 1),
        (2, 0, 0),
        (3, 0, 1),
        distances=((10, 20, 13, 23), (20, 10, 23, 13), (13, 23, 10, 23), (23, 13, 23, 10)),
    )
    placement = resolve(PlacementSpec("shard", nodes=(2, 3)), Units(64), hbm)
    assert placement.parts == (Part((2,), False, (0,), 0, 32), Part((3,), False, (1,), 32, 64))
    # Unless they are listed, nothing lies on them.
    for policy in ("shard", "mirror", "interleave"):
        assert {n for part in resolve(PlacementSpec(policy), Units(64), hbm).parts for n in part.memory_nodes} == {0, 1}


@pytest.mark.parametrize(
    ("spec", "where", "gains", "policy", "reason"),
    [
        (PlacementSpec(), layout((0, 8, 0)), (), "bind", "there is one usable node"),
        (PlacementSpec(nodes=(1,)), TWO, ("prefill divided by tokens",), "bind", "there is one usable node"),
        (PlacementSpec(), TWO, (), "shard", "nothing here gains from copies"),
        (
            PlacementSpec(),
            TWO,
            ("prefill divided by tokens",),
            "mirror",
            "2 copies, one per node: prefill divided by tokens",
        ),
        (
            PlacementSpec(),
            layout((0, 8, 0), (1, 8, 1), free=1 << 26),
            ("prefill",),
            "shard",
            "do not fit in 80% of what is free",
        ),
        (PlacementSpec(budget=1000), TWO, ("prefill",), "shard", "budget of 1000 B per node is spent"),
    ],
)
def test_auto_says_why(spec, where, gains, policy, reason):
    placement = resolve(spec, Units(1024), where, mirror_gains=gains)
    assert placement.policy == policy
    assert placement.reason.startswith("auto: ")
    assert reason in placement.reason


def test_auto_keeps_a_small_weight_on_one_node():
    placement = resolve(PlacementSpec(), Units(64, packed_bytes=4096), TWO, mirror_gains=("prefill",))
    assert placement.policy == "bind"
    assert placement.parts == (Part((0,), False, (0,), 0, 64),)


def test_auto_mirrors_until_a_fifth_of_the_memory_is_left():
    """80 % of 10 units of memory hold 8 copies; the rest of the model is sharded."""
    placer = Placer(layout((0, 8, 0), (1, 8, 1), free=10 * GIB))
    policies = [
        placer.place("experts", PlacementSpec(), Units(64, packed_bytes=GIB), mirror_gains=("prefill",)).policy
        for _ in range(12)
    ]
    assert policies == ["mirror"] * 8 + ["shard"] * 4
    assert placer.left == {0: 0, 1: 0}


def test_the_reserve_comes_first():
    placer = Placer(layout((0, 8, 0), (1, 8, 1), free=10 * GIB), reserve_bytes=9 * GIB)
    assert placer.place("x", PlacementSpec(), Units(64, packed_bytes=GIB), mirror_gains=("prefill",)).policy == "shard"


def test_a_budget_counts_per_rule_and_stays_spent():
    placer = Placer(TWO)
    spec = PlacementSpec("mirror", budget=5 * GIB)
    sizes = [2, 2, 2, 1]
    first = [placer.place("a", spec, Units(64, packed_bytes=size * GIB)) for size in sizes]
    assert [placement.policy for placement in first] == ["mirror", "mirror", "shard", "shard"]
    assert "budget of 5.00 GiB per node is spent" in first[2].reason
    assert placer.place("b", spec, Units(64, packed_bytes=GIB)).policy == "mirror"


def test_a_virtual_layout_places_by_index():
    virtual = RuntimeLayout.virtual(8, sockets=2)
    assert len(resolve(PlacementSpec("mirror"), Units(64), virtual).parts) == 8
    assert resolve(PlacementSpec("mirror", per="socket"), Units(64), virtual).replicas == 2
    assert resolve(PlacementSpec("bind", nodes=(3,)), Units(64), virtual).parts[0].memory_nodes == (3,)
    assert Placer(virtual).place("a", PlacementSpec(), Units(4096), mirror_gains=("prefill",)).policy == "mirror"


def test_placed_bytes_adds_up():
    placement = resolve(PlacementSpec("shard"), Units(100, 16), TWO)
    assert placed_bytes(placement, 1000) == {0: 640, 1: 360}
    assert placed_bytes(resolve(PlacementSpec("mirror"), Units(100), TWO), 1000) == {0: 1000, 1: 1000}
