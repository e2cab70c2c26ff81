"""Whatever the machine and the rule: every unit is held, each copy once, by nodes that exist, and computed by threads that do."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from numagraft.errors import ConfigurationError
from numagraft.placement import POLICIES, Placement, PlacementSpec, Placer, parse, placed_bytes, resolve
from numagraft.runtime import RuntimeLayout, RuntimeNode

GIB = 1 << 30


@dataclass(frozen=True)
class Units:
    count: int
    multiple: int
    packed_bytes: int


@st.composite
def layouts(draw: st.DrawFn) -> RuntimeLayout:
    ids = draw(st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True).map(sorted))
    threads = draw(st.lists(st.integers(0, 9), min_size=len(ids), max_size=len(ids)))
    if not any(threads):
        threads[0] = 1
    sockets = draw(st.lists(st.integers(0, 2), min_size=len(ids), max_size=len(ids)))
    free = draw(st.lists(st.integers(0, 64 * GIB), min_size=len(ids), max_size=len(ids)))
    nodes = tuple(
        RuntimeNode(id, tuple(range(100 * id, 100 * id + count)), count, socket, amount, 64 * GIB)
        for id, count, socket, amount in zip(ids, threads, sockets, free, strict=True)
    )
    distances = ()
    if draw(st.booleans()):
        distances = tuple(
            tuple(10 if a == b else draw(st.integers(11, 40)) for b in range(len(ids))) for a in range(len(ids))
        )
    return RuntimeLayout(nodes, bound=draw(st.booleans()), distances=distances)


units = st.builds(Units, st.integers(1, 5000), st.integers(1, 256), st.integers(1, 8 * GIB))
specs = st.builds(
    PlacementSpec,
    st.sampled_from(POLICIES),
    st.none() | st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True).map(lambda ids: tuple(sorted(ids))),
    st.sampled_from(["node", "socket"]),
    st.none() | st.integers(0, 16 * GIB),
)
gains = st.sampled_from([(), ("prefill divided by tokens",)])


def check(placement: Placement, layout: RuntimeLayout, spec: PlacementSpec, count: int) -> None:
    assert placement.policy in POLICIES and placement.policy != "auto"
    assert placement.reason
    assert (
        placement.policy == spec.policy
        or spec.policy == "auto"
        or (spec.policy == "mirror" and spec.budget is not None)
    )
    allowed = {layout.index_of(id) for id in spec.nodes} if spec.nodes is not None else set(layout.compute_nodes)
    covered = [0] * (count + 1)
    for part in placement.parts:
        assert 0 <= part.begin < part.end <= count
        assert part.memory_nodes and set(part.memory_nodes) <= allowed
        assert len(set(part.memory_nodes)) == len(part.memory_nodes)
        assert part.worker_nodes and all(layout.nodes[worker].threads > 0 for worker in part.worker_nodes)
        assert list(part.worker_nodes) == sorted(set(part.worker_nodes))
        if len(part.memory_nodes) == 1 and layout.nodes[part.memory_nodes[0]].threads:
            assert part.worker_nodes == part.memory_nodes, "computed where it lies"
        covered[part.begin] += 1
        covered[part.end] -= 1
    depth = 0
    for change in covered[:-1]:
        depth += change
        assert depth == placement.replicas
    if placement.policy in ("shard", "bind", "interleave"):
        assert placement.replicas == 1


@given(layouts(), specs, units, gains)
def test_any_rule_on_any_machine(layout, spec, module, mirror_gains):
    try:
        placement = resolve(spec, module, layout, mirror_gains=mirror_gains)
    except ConfigurationError as error:
        there = {node.os_node for node in layout.nodes}
        assert spec.nodes is not None and not set(spec.nodes) <= there
        assert len(error.problems) == len(set(spec.nodes) - there)
        return
    check(placement, layout, spec, module.count)
    amounts = placed_bytes(placement, module.packed_bytes)
    assert set(amounts) == {node for part in placement.parts for node in part.memory_nodes}
    slack = len(placement.parts) * len(layout.nodes)
    assert 0 <= sum(amounts.values()) - placement.replicas * module.packed_bytes <= slack


@given(layouts(), st.lists(st.tuples(specs, units), max_size=12), gains, st.integers(0, 8 * GIB))
def test_accounts_never_exceed_what_was_promised(layout, modules, mirror_gains, reserve):
    placer = Placer(layout, reserve_bytes=reserve, small_bytes=1)
    start = dict(placer.left)
    mirrored: dict[str, dict[int, int]] = {}
    taken = dict.fromkeys(start, 0)
    for index, (spec, module) in enumerate(modules):
        rule = f"rule {index % 2}"
        try:
            placement = placer.place(rule, spec, module, mirror_gains=mirror_gains)
        except ConfigurationError:
            continue
        amounts = placed_bytes(placement, module.packed_bytes)
        if placement.policy == "mirror":
            own = mirrored.setdefault(rule, dict.fromkeys(start, 0))
            for node, amount in amounts.items():
                own[node] += amount
            if spec.budget is not None:
                assert all(own[node] <= spec.budget for node in amounts), "the budget is per node"
            if spec.policy == "auto":
                for node, amount in amounts.items():
                    assert taken[node] + amount <= 0.8 * start[node] + len(layout.nodes), "a fifth stays free"
        for node, amount in amounts.items():
            taken[node] += amount
        assert placer.left == {node: start[node] - taken[node] for node in start}


@given(specs)
def test_the_long_form_says_what_the_spec_says(spec):
    value: dict[str, object] = {"policy": spec.policy}
    if spec.nodes is not None:
        value["nodes"] = list(spec.nodes)
    if spec.policy in ("mirror", "auto"):
        value["per"] = spec.per
        if spec.budget is not None:
            value["budget"] = spec.budget
        assert parse(value) == spec
    else:
        assert parse(value) == PlacementSpec(spec.policy, spec.nodes)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda each: st.lists(each, max_size=4)
    )
)
def test_parse_never_raises_anything_else(value):
    for form in (value, {"policy": value}, {"nodes": value}, {"per": value}, {"budget": value}, {str(value): value}):
        try:
            spec = parse(form)
        except ConfigurationError as error:
            assert error.problems
        else:
            assert isinstance(spec, PlacementSpec)
