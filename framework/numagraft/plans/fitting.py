"""Whether a plan fits the memory that is free, and if not, the nearest change that does. Imports torch through operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numagraft.errors import ConfigurationError, PlanError
from numagraft.placement import PlacementSpec, Placer
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Location, Rule, RuleSet
from numagraft.runtime import RuntimeLayout
from numagraft.sizes import format_size

if TYPE_CHECKING:
    from numagraft.planning import Plan
    from numagraft.plans.planner import Placed
    from numagraft.platform import Platform

#: formats from the largest to the smallest
FORMATS = ("bf16", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Change:
    """Another way to place the same modules: a policy for mirrored rules, a format for all, and what they then need."""

    settings: tuple[str, ...]
    node_bytes: Mapping[int, int]


def check_fit(plan: Plan, placed: Sequence[Placed], platform: Platform, rules: RuleSet) -> None:
    """Raises PlanError naming what does not fit and the nearest change that does."""
    short = shortages(plan.layout, plan.node_bytes, plan.kept_bytes, platform)
    devices = device_shortages(plan.device_bytes, platform)
    if not short and not devices:
        return
    problems = Problems()
    hint = nearest_change(plan, placed, platform) if short else "move fewer modules there"
    mirrored = [each.rule for each in placed if each.spec.policy == "mirror"]
    place = _where(mirrored) if mirrored else Location(rules.source, 0, 0)
    for index, text in enumerate([*short, *devices]):
        problems.add(dataclasses.replace(place, column=place.column), text, hint if index == 0 else "")
    problems.raise_if_any(f"{plan.source} on {plan.model_class} does not fit in memory", PlanError)


def _where(rules: Sequence[Rule]) -> Location:
    return rules[0].mark("replace.kwargs.placement")


def shortages(
    layout: RuntimeLayout, node_bytes: Mapping[int, int], kept_bytes: int, platform: Platform | None
) -> list[str]:
    """What does not fit, in words; a node that does not say how much it has (a virtual layout) is not judged."""
    found = []
    known = [index for index, node in enumerate(layout.nodes) if node.total_bytes > 0]
    for index in known:
        need, free = node_bytes.get(index, 0), layout.nodes[index].free_bytes
        if need > free:
            name = layout.nodes[index].os_node
            found.append(f"node {index if name is None else name} needs {format_size(need)}, {format_size(free)} are free")
    if not known or found:
        return found
    everything = sum(node_bytes.values()) + kept_bytes
    free = sum(layout.nodes[index].free_bytes for index in known)
    limit = platform.cgroup.memory_available if platform is not None else None
    if limit is not None:
        free = min(free, limit)
    if everything > free:
        found.append(
            f"{format_size(sum(node_bytes.values()))} of packed weights and {format_size(kept_bytes)} that stay as they are "
            f"need {format_size(everything)}, {format_size(free)} are free"
        )
    return found


def device_shortages(device_bytes: Mapping[str, int], platform: Platform) -> list[str]:
    found = []
    for device, need in sorted(device_bytes.items()):
        kind, _, number = device.partition(":")
        index = int(number) if number else 0
        if kind != "cuda" or index >= len(platform.gpus):
            continue
        memory = platform.gpus[index].memory_bytes
        if memory is not None and need > memory:
            found.append(f"{device} needs {format_size(need)}, it has {format_size(memory)}")
    return found


def nearest_change(plan: Plan, placed: Sequence[Placed], platform: Platform) -> str:
    """The first of these that fits: shard what is mirrored, mirror within a budget, a smaller format, both."""
    least: Change | None = None
    for change in _changes(plan, placed):
        if not shortages(plan.layout, change.node_bytes, plan.kept_bytes, platform):
            needs = " and ".join(format_size(amount) for amount in _distinct(change.node_bytes.values()))
            return f"nearest change that fits: {' '.join(f'--set {s}' for s in change.settings)} (needs {needs} per node)"
        if least is None or sum(change.node_bytes.values()) < sum(least.node_bytes.values()):
            least = change
    if least is None:
        return "free memory, or use a machine with more"
    total = format_size(sum(least.node_bytes.values()) + plan.kept_bytes)
    how = " ".join(f"--set {setting}" for setting in least.settings)
    return f"even {how} needs {total} in all: free memory, or use a machine with more"


def _distinct(amounts: Iterable[int]) -> list[int]:
    """Amounts that differ by more than a percent, the largest first."""
    found: list[int] = []
    for amount in sorted(amounts, reverse=True):
        if not found or found[-1] - amount > found[-1] // 100:
            found.append(amount)
    return found


def _changes(plan: Plan, placed: Sequence[Placed]) -> Iterable[Change]:
    layout = plan.layout
    mirrored = {each.name for each in plan.modules if each.placement is not None and each.placement.policy == "mirror"}
    by_rule = {each.rule.id: each.rule for each in placed if each.name in mirrored}
    if mirrored:
        shard = _settings(by_rule.values(), "placement", "shard")
        yield Change(shard, needs(placed, layout, policy="shard", only=mirrored))
        budget = _budget(plan, placed, mirrored)
        if budget and len(by_rule) == 1:
            setting = _settings(by_rule.values(), "placement", f"{{policy: mirror, budget: {budget}GiB}}")
            spec = PlacementSpec(policy="mirror", budget=budget << 30)
            yield Change(tuple(f"'{s}'" for s in setting), needs(placed, layout, spec=spec, only=mirrored))
    formatted = [each for each in placed if hasattr(each.usable.params, "format")]
    now = [each.usable.params.format for each in formatted]
    current = max((FORMATS.index(format) for format in now if format in FORMATS), default=0)
    for format in FORMATS[current + 1 :] if formatted else ():
        rules = {each.rule.id: each.rule for each in formatted}
        smaller = _settings(rules.values(), "format", format)
        yield Change(smaller, needs(placed, layout, format=format))
        if mirrored:
            both = (*smaller, *_settings(by_rule.values(), "placement", "shard"))
            yield Change(both, needs(placed, layout, format=format, policy="shard", only=mirrored))


def _settings(rules: Iterable[Rule], kwarg: str, value: str) -> tuple[str, ...]:
    """What to `--set`: the variable that the kwarg names, else the kwarg of each rule."""
    found = []
    for rule in rules:
        path = f"replace.kwargs.{kwarg}"
        found.append(f"{rule.references.get(path, f'rules.{rule.id}.{path}')}={value}")
    return tuple(dict.fromkeys(found))


def _budget(plan: Plan, placed: Sequence[Placed], mirrored: set[str]) -> int:
    """Whole GiB per node that may be mirrored so that the rest, sharded, still fits."""
    layout = plan.layout
    count = len(layout.compute_nodes)
    if count < 2:
        return 0
    sharded = needs(placed, layout, policy="shard", only=mirrored)
    room = min(layout.nodes[i].free_bytes - sharded.get(i, 0) for i in layout.compute_nodes)
    room -= -(-plan.kept_bytes // count)
    return max(0, int(room * count / (count - 1)) >> 30)


def needs(
    placed: Sequence[Placed],
    layout: RuntimeLayout,
    *,
    policy: str | None = None,
    format: str | None = None,
    spec: PlacementSpec | None = None,
    only: set[str] | None = None,
) -> dict[int, int]:
    """Bytes per runtime node if the modules `only` (all without) were placed by `policy` or `spec`, or stored in `format`."""
    placer = Placer(layout)
    totals: dict[int, int] = {index: 0 for index in range(len(layout.nodes))}
    for each in placed:
        params: Any = each.usable.params
        if format is not None and hasattr(params, "format"):
            plain = {"format": format}
            defaults = {field.name: field.default for field in dataclasses.fields(params)}
            if format != params.format and "group" in defaults:  # grouping belongs to one format
                plain |= {name: defaults[name] for name in ("group", "symmetric", "activations") if name in defaults}
            params = dataclasses.replace(params, **plain)
        wanted = each.spec
        if only is None or each.name in only:
            if spec is not None:
                wanted = spec
            elif policy is not None:
                wanted = PlacementSpec(policy=policy, nodes=each.spec.nodes)  # type: ignore[arg-type]
        units = each.usable.operator.units(each.module, params) if params is not each.usable.params else each.units
        try:
            placement = placer.place(each.rule.id, wanted, units)
        except ConfigurationError:
            continue
        footprint = each.usable.operator.footprint(each.module, params, placement, each.usable.device)
        for node, amount in footprint.node_bytes.items():
            totals[node] = totals.get(node, 0) + amount
    return totals
