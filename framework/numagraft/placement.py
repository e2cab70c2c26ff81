"""Placement: what a rule may ask (`PlacementSpec`), and what was decided for one module (`Placement`). No torch.

Node numbers here index `RuntimeLayout.nodes`; the kernel's ids live in `RuntimeLayout.nodes[i].os_node`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from numagraft.errors import ConfigurationError, Problem
from numagraft.platform.ids import MAX_ID, format_list
from numagraft.runtime import RuntimeLayout
from numagraft.sizes import format_size, parse_size

Policy = Literal["auto", "shard", "mirror", "interleave", "bind"]

POLICIES: tuple[str, ...] = get_args(Policy)

#: `auto` keeps a weight of fewer bytes on one node: at 100 GB/s a node reads 1 MiB in 10 µs, and what a second node
#: could save of that, a fork-join over two sockets costs.
SMALL_BYTES = 1 << 20

#: `auto` mirrors only while all copies fit in this share of what is free on every node.
MIRROR_SHARE = 0.8

#: Free memory of a node that does not say how much it has: a virtual layout.
_UNKNOWN_BYTES = 1 << 60

_NO_GAIN = "nothing here gains from copies: shard reads as fast at 1/{} of the memory"


@dataclass(frozen=True)
class PlacementSpec:
    """A rule's `placement` kwarg: the short form is the policy's name, the long form a mapping with these keys.

    `nodes` are kernel node ids (None: every usable node); `budget` is bytes per node and rule (mirror only): whole
    modules in model order are mirrored until it is spent, the rest sharded.
    """

    policy: Policy = "auto"
    nodes: tuple[int, ...] | None = None
    per: Literal["node", "socket"] = "node"
    budget: int | None = None

    def __str__(self) -> str:
        parts = [f"nodes {format_list(self.nodes)}"] if self.nodes is not None else []
        parts += ["per socket"] if self.per == "socket" else []
        parts += [f"budget {format_size(self.budget)}"] if self.budget is not None else []
        return self.policy + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class Part:
    """Units [begin, end) of a weight, the runtime nodes that hold them and the runtime nodes that compute them."""

    memory_nodes: tuple[int, ...]
    interleaved: bool
    worker_nodes: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Placement:
    """The decision for one module: a concrete policy (never `auto`), its parts, and why."""

    policy: Policy
    parts: tuple[Part, ...]
    reason: str = ""

    @property
    def replicas(self) -> int:
        """How often every unit is held."""
        covered = sum(part.end - part.begin for part in self.parts)
        count = max((part.end for part in self.parts), default=0) - min((part.begin for part in self.parts), default=0)
        return covered // count if count else 1


class Divisible(Protocol):
    """What placement must know of a module; `numagraft.contract.Units` is one."""

    @property
    def count(self) -> int: ...
    @property
    def multiple(self) -> int: ...
    @property
    def packed_bytes(self) -> int: ...


def parse(value: object, *, where: str = "placement") -> PlacementSpec:
    """A rule's placement, short ("mirror") or long ({policy: mirror, nodes: [0, 2], per: socket, budget: "64GiB"}).

    Raises ConfigurationError with a Problem for everything that is wrong; `where` begins each.
    """
    if isinstance(value, PlacementSpec):
        return value
    if isinstance(value, str):
        value = {"policy": value}
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            "wrong placement",
            [
                Problem(
                    where,
                    f"found {value!r}",
                    f"expected one of {', '.join(POLICIES)}, or a mapping with the keys policy, nodes, per, budget",
                )
            ],
        )
    problems: list[Problem] = []
    known = ("policy", "nodes", "per", "budget")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            problems.append(
                Problem(
                    f"{where}.{key}",
                    "unknown key",
                    f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}",
                )
            )
    policy = value.get("policy", "auto")
    if policy not in POLICIES:
        close = difflib.get_close_matches(str(policy), POLICIES, n=1)
        known_policies = f"policies: {', '.join(POLICIES)}"
        hint = f"did you mean {close[0]}? {known_policies}" if close else known_policies
        problems.append(Problem(f"{where}.policy", f"unknown policy {policy!r}", hint))
    nodes = _parse_nodes(value.get("nodes"), f"{where}.nodes", problems)
    per = value.get("per", "node")
    if per not in ("node", "socket"):
        problems.append(Problem(f"{where}.per", f"found {per!r}", 'expected "node" or "socket"'))
    elif per == "socket" and policy in POLICIES and policy not in ("mirror", "auto"):
        problems.append(
            Problem(f"{where}.per", f"has no meaning for {policy}", "only mirrors are made per node or socket")
        )
    budget = None
    if value.get("budget") is not None:
        try:
            budget = parse_size(value["budget"])
        except ValueError as error:
            problems.append(Problem(f"{where}.budget", str(error)))
        if policy in POLICIES and policy not in ("mirror", "auto"):
            problems.append(
                Problem(f"{where}.budget", f"has no meaning for {policy}", "a budget limits mirrors; remove it")
            )
    if problems:
        raise ConfigurationError("wrong placement", problems)
    return PlacementSpec(policy=policy, nodes=nodes, per=per, budget=budget)


def _parse_nodes(value: object, where: str, problems: list[Problem]) -> tuple[int, ...] | None:
    if value is None or value == "all":
        return None
    expected = 'expected a list of node numbers such as [0, 2], or "all"'
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        problems.append(Problem(where, f"found {value!r}", expected))
        return None
    wrong = [item for item in value if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < MAX_ID]
    if wrong:
        problems.append(Problem(where, f"found {', '.join(map(repr, wrong))} in the list", expected))
        return None
    if len(set(value)) != len(value):
        twice = sorted({item for item in value if list(value).count(item) > 1})
        problems.append(Problem(where, f"node {format_list(twice)} is listed more than once", "list every node once"))
        return None
    return tuple(sorted(value))


def resolve(
    spec: PlacementSpec,
    units: Divisible,
    layout: RuntimeLayout,
    *,
    free_bytes_by_node: Mapping[int, int] | None = None,
    mirror_gains: Sequence[str] = (),
    mirrored_bytes: int = 0,
    small_bytes: int = SMALL_BYTES,
    no_gain: str = "",
    where: str = "placement",
) -> Placement:
    """Decides where one module's units lie and who computes them. Pure; `Placer` keeps the accounts over a whole model.

    free_bytes_by_node: index -> bytes left for weights (default: the layout's). mirror_gains: what a mirror of this
    module buys besides what a shard does ("prefill divided by tokens", ...); `auto` mirrors only where there is one;
    no_gain: why there is none, for `auto`'s reason.
    mirrored_bytes: bytes per node that this rule has mirrored already, held against its budget.

    A shard splits at multiples of `units.multiple` in proportion to threads; the last block may be short, and a node
    may get nothing. Raises ConfigurationError for nodes that do not exist, lack memory, or are not in the layout.
    """
    free = _free_bytes(layout) if free_bytes_by_node is None else dict(free_bytes_by_node)
    nodes = _nodes(spec, layout, where)
    size = units.packed_bytes
    if spec.policy == "auto":
        return _resolve_auto(spec, units, layout, nodes, free, mirror_gains, mirrored_bytes, small_bytes, no_gain)
    if spec.policy == "bind":
        if spec.nodes is not None:
            named = _names(layout, nodes)
            return Placement("bind", (_whole(units, layout, nodes),), f"one copy on node {named}, as asked")
        node = _roomiest_first(nodes, layout, free, size)
        return Placement("bind", (_whole(units, layout, (node,)),), f"one copy on node {_names(layout, (node,))}")
    if spec.policy == "interleave":
        part = _whole(units, layout, nodes, interleaved=len(nodes) > 1)
        return Placement("interleave", (part,), f"one copy, page by page over {_count(nodes)}")
    if spec.policy == "shard":
        return _shard(units, layout, nodes, f"1/{len(nodes)} on each node")
    groups = _replica_groups(spec, layout, nodes)
    per_node = _per_node_bytes(groups, size)
    if spec.budget is not None and mirrored_bytes + per_node > spec.budget:
        reason = (
            f"the mirror budget of {format_size(spec.budget)} per node is spent "
            f"({format_size(mirrored_bytes)} used, {format_size(per_node)} needed)"
        )
        return _shard(units, layout, nodes, reason)
    if mirror_gains:
        reason = f"{_copies(groups)} as asked: {', '.join(mirror_gains)}"
    elif len(groups) > 1:
        reason = f"{_copies(groups)} as asked; {_NO_GAIN.format(len(groups))}"
    else:
        reason = "one copy: there is one node"
    return _mirror(units, layout, groups, reason)


class Placer:
    """Resolves the modules of one plan in model order, keeping account of memory and of every rule's mirror budget.

    `reserve_bytes` are set aside on each node (key-value cache, activations) before anything is placed.
    """

    def __init__(self, layout: RuntimeLayout, *, reserve_bytes: int = 0, small_bytes: int = SMALL_BYTES) -> None:
        self.layout = layout
        self.left = {i: max(0, free - reserve_bytes) for i, free in _free_bytes(layout).items()}
        self._start = dict(self.left)
        self._mirrored: dict[str, int] = {}
        self._spent: set[str] = set()
        self._small_bytes = small_bytes

    def place(
        self,
        rule_id: str,
        spec: PlacementSpec,
        units: Divisible,
        *,
        mirror_gains: Sequence[str] = (),
        no_gain: str = "",
        where: str = "placement",
    ) -> Placement:
        """The next module of `rule_id`. A budget, once a module did not fit in it, is spent: later ones are sharded."""
        if spec.budget is not None and rule_id in self._spent:
            spec = replace(spec, budget=0)
        mirrored = self._mirrored.get(rule_id, 0)
        room = {i: left - int((1 - MIRROR_SHARE) * self._start[i]) for i, left in self.left.items()}
        placement = resolve(
            spec,
            units,
            self.layout,
            free_bytes_by_node={i: int(max(0, amount) / MIRROR_SHARE) for i, amount in room.items()}
            if spec.policy == "auto"
            else self.left,
            mirror_gains=mirror_gains,
            mirrored_bytes=mirrored,
            small_bytes=self._small_bytes,
            no_gain=no_gain,
            where=where,
        )
        for node, amount in placed_bytes(placement, units.packed_bytes).items():
            self.left[node] -= amount
        if placement.policy == "mirror":
            self._mirrored[rule_id] = mirrored + max(placed_bytes(placement, units.packed_bytes).values(), default=0)
        elif spec.budget is not None:
            self._spent.add(rule_id)
        return placement


def placed_bytes(placement: Placement, packed_bytes: int) -> dict[int, int]:
    """Runtime node -> bytes: `packed_bytes` divided in proportion to units (native code knows the padding exactly)."""
    count = max((part.end for part in placement.parts), default=0)
    totals: dict[int, int] = {}
    for part in placement.parts:
        share = -(-packed_bytes * (part.end - part.begin) // count) if count else 0
        # A bind to several nodes fills the first before the next; evenly is the best guess for both.
        for node in part.memory_nodes:
            totals[node] = totals.get(node, 0) + -(-share // len(part.memory_nodes))
    return totals


def split_units(count: int, multiple: int, weights: Sequence[int]) -> list[tuple[int, int]]:
    """[begin, end) per weight: whole blocks of `multiple` units by largest remainder; the last block may be short.

    >>> split_units(10, 4, [1, 1])
    [(0, 8), (8, 10)]
    """
    if count < 0 or multiple < 1 or not weights or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"cannot split {count} units at multiples of {multiple} by {list(weights)}")
    blocks = -(-count // multiple)
    total = sum(weights)
    quotas = [blocks * weight // total for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(blocks * weights[i] % total), i))
    for i in order[: blocks - sum(quotas)]:
        quotas[i] += 1
    bounds, at = [], 0
    for quota in quotas:
        bounds.append((min(count, at * multiple), min(count, (at + quota) * multiple)))
        at += quota
    return bounds


def _resolve_auto(
    spec: PlacementSpec,
    units: Divisible,
    layout: RuntimeLayout,
    nodes: tuple[int, ...],
    free: Mapping[int, int],
    gains: Sequence[str],
    mirrored_bytes: int,
    small_bytes: int,
    no_gain: str,
) -> Placement:
    size = units.packed_bytes
    if len(nodes) == 1:
        return Placement("bind", (_whole(units, layout, nodes),), "auto: there is one usable node")
    if size < small_bytes:
        node = _roomiest_first(nodes, layout, free, size)
        reason = (
            f"auto: {format_size(size)} is less than the {format_size(small_bytes)} from which a second node saves more "
            "than its fork-join costs"
        )
        return Placement("bind", (_whole(units, layout, (node,)),), reason)
    if not gains:
        return _shard(units, layout, nodes, f"auto: {no_gain or _NO_GAIN.format(len(nodes))}")
    groups = _replica_groups(spec, layout, nodes)
    per_node = _per_node_bytes(groups, size)
    if spec.budget is not None and mirrored_bytes + per_node > spec.budget:
        return _shard(units, layout, nodes, f"auto: the mirror budget of {format_size(spec.budget)} per node is spent")
    tight = [node for node in nodes if per_node > MIRROR_SHARE * free.get(node, 0)]
    if tight:
        reason = (
            f"auto: copies of {format_size(per_node)} do not fit in {MIRROR_SHARE:.0%} of what is free on node "
            f"{_names(layout, tight)}"
        )
        return _shard(units, layout, nodes, reason)
    return _mirror(units, layout, groups, f"auto: {_copies(groups)}: {', '.join(gains)}")


def _nodes(spec: PlacementSpec, layout: RuntimeLayout, where: str) -> tuple[int, ...]:
    """Runtime indices of the nodes asked for; without a list, those that compute."""
    if spec.nodes is None:
        return layout.compute_nodes
    there = [index if node.os_node is None else node.os_node for index, node in enumerate(layout.nodes)]
    problems = [
        Problem(
            f"{where}.nodes",
            f"node {id} is not among the runtime's nodes",
            f"the runtime has nodes {format_list(there)}; list others in runtime.nodes, if this machine has them "
            "(`numagraft doctor` shows them)",
        )
        for id in spec.nodes
        if id not in there
    ]
    if not problems and layout.bound:
        problems = [
            Problem(f"{where}.nodes", f"node {id} has no memory", f"nodes with memory: {_with_memory(layout)}")
            for id in spec.nodes
            if (index := layout.index_of(id)) is not None and layout.nodes[index].total_bytes == 0
        ]
        # A layout made by hand need not say how much memory there is.
        if all(node.total_bytes == 0 for node in layout.nodes):
            problems = []
    if problems:
        raise ConfigurationError("the placement asks for nodes that cannot be had", problems)
    return tuple(index for id in spec.nodes if (index := layout.index_of(id)) is not None)


def _with_memory(layout: RuntimeLayout) -> str:
    return format_list(
        index if node.os_node is None else node.os_node for index, node in enumerate(layout.nodes) if node.total_bytes
    )


def _whole(units: Divisible, layout: RuntimeLayout, nodes: Sequence[int], *, interleaved: bool = False) -> Part:
    return Part(tuple(nodes), interleaved, _workers(layout, nodes), 0, units.count)


def _workers(layout: RuntimeLayout, nodes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({worker for node in nodes for worker in layout.nearest_compute_nodes(node)}))


def _shard(units: Divisible, layout: RuntimeLayout, nodes: tuple[int, ...], reason: str) -> Placement:
    weights = [sum(layout.nodes[worker].threads for worker in layout.nearest_compute_nodes(node)) for node in nodes]
    if not sum(weights):
        weights = [1] * len(nodes)
    bounds = split_units(units.count, units.multiple, weights)
    parts = tuple(
        Part((node,), False, _workers(layout, (node,)), begin, end)
        for node, (begin, end) in zip(nodes, bounds, strict=True)
        if end > begin
    )
    if not parts:
        parts = (_whole(units, layout, nodes[:1]),)
    idle = len(nodes) - len(parts)
    if idle:
        reason += f"; {units.count} units in blocks of {units.multiple} leave {idle} of {len(nodes)} nodes empty"
    return Placement("shard", parts, reason)


def _mirror(units: Divisible, layout: RuntimeLayout, groups: Sequence[tuple[int, ...]], reason: str) -> Placement:
    return Placement(
        "mirror", tuple(_whole(units, layout, group, interleaved=len(group) > 1) for group in groups), reason
    )


def _replica_groups(spec: PlacementSpec, layout: RuntimeLayout, nodes: Sequence[int]) -> list[tuple[int, ...]]:
    """The nodes of each replica: one by one, or those of a socket together, pages round-robin."""
    if spec.per == "node":
        return [(node,) for node in nodes]
    sockets: dict[int, list[int]] = {}
    for node in nodes:
        sockets.setdefault(layout.nodes[node].socket, []).append(node)
    return [tuple(group) for _, group in sorted(sockets.items())]


def _per_node_bytes(groups: Sequence[tuple[int, ...]], size: int) -> int:
    return max(-(-size // len(group)) for group in groups)


def _roomiest_first(nodes: Sequence[int], layout: RuntimeLayout, free: Mapping[int, int], size: int) -> int:
    """The first node with room, so that small weights lie together; the roomiest where none has."""
    compute = [node for node in nodes if node in layout.compute_nodes] or list(nodes)
    for node in compute:
        if free.get(node, 0) >= size:
            return node
    return max(compute, key=lambda node: (free.get(node, 0), -node))


def _free_bytes(layout: RuntimeLayout) -> dict[int, int]:
    return {i: node.free_bytes if node.total_bytes else _UNKNOWN_BYTES for i, node in enumerate(layout.nodes)}


def _names(layout: RuntimeLayout, nodes: Sequence[int]) -> str:
    return format_list(index if (os_node := layout.nodes[index].os_node) is None else os_node for index in nodes)


def _count(nodes: Sequence[int]) -> str:
    return f"{len(nodes)} nodes" if len(nodes) > 1 else "one node"


def _copies(groups: Sequence[tuple[int, ...]]) -> str:
    kind = "socket" if any(len(group) > 1 for group in groups) else "node"
    return f"{len(groups)} copies, one per {kind}" if len(groups) > 1 else "one copy"
