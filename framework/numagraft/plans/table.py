"""A plan as tables for a terminal: modules that differ only in their layer make one row. No torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from numagraft.platform.ids import format_list
from numagraft.sizes import format_size

if TYPE_CHECKING:
    from numagraft.planning import KeptModule, Plan, PlannedModule

#: more nodes than this share one column with the smallest and the largest amount
NODE_COLUMNS = 4

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def group_name(names: Iterable[str]) -> str:
    """Names that differ in one index only, as one: `model.layers.{0-29}.mlp`.

    >>> group_name(["model.layers.0.mlp", "model.layers.1.mlp"])
    'model.layers.{0-1}.mlp'
    """
    names = list(names)
    if len(names) == 1:
        return names[0]
    numbers = [[int(found) for found in _INDEX.findall(name)] for name in names]
    varying = [column for column in zip(*numbers, strict=True)]
    pieces = _INDEX.split(names[0])
    text = pieces[0]
    for column, piece in zip(varying, pieces[1:], strict=True):
        distinct = sorted(set(column))
        text += (str(distinct[0]) if len(distinct) == 1 else f"{{{format_list(distinct)}}}") + piece
    return text


def group_names(names: Iterable[str]) -> list[str]:
    """Names in as few words as they go, in order of first use.

    >>> group_names(["layers.0.a", "norm", "layers.1.a"])
    ['layers.{0-1}.a', 'norm']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_key(name), []).append(name)
    return [group_name(group) for group in groups.values()]


def _key(name: str) -> str:
    return _INDEX.sub("{}", name)


def groups_of(plan: Plan) -> list[list[PlannedModule]]:
    """Modules in model order, those together that differ only in their layer."""
    found: dict[tuple[object, ...], list[PlannedModule]] = {}
    for module in plan.modules:
        placed = "" if module.placement is None else module.placement.policy
        key = (_key(module.name), module.rule_id, module.operator, module.device, repr(module.params), placed, module.note)
        found.setdefault(key, []).append(module)
    return list(found.values())


def _add(into: dict[int, int], amounts: Mapping[int, int]) -> None:
    for key, amount in amounts.items():
        into[key] = into.get(key, 0) + amount


def render(plan: Plan) -> RenderableType:
    """Tables for `rich`: what is replaced, what is kept, what it needs and what is free."""
    parts: list[RenderableType] = [_modules(plan), _memory(plan)]
    if plan.bytes_per_token:
        parts.append(Text(f"  {format_size(plan.bytes_per_token)} of packed weights are read per generated token"))
    if plan.kept:
        parts.append(_kept(plan))
    if plan.fallbacks:
        parts.append(_lines("Fallbacks", plan.fallbacks, "yellow"))
    if plan.modules:
        parts.append(_lines("Rules", _rules(plan), ""))
    reasons = _reasons(plan)
    if reasons:
        parts.append(_lines("Placement", reasons, ""))
    if plan.notes:
        parts.append(_lines("Notes", plan.notes, "dim"))
    return Group(*parts)


def as_text(plan: Plan, *, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(render(plan))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _modules(plan: Plan) -> Table:
    nodes = range(len(plan.layout.nodes))
    several = len(nodes) > NODE_COLUMNS
    table = Table(title=f"{plan.model_class} by {plan.source}", title_justify="left", title_style="bold", show_edge=False)
    for heading in ("modules", "rule"):
        table.add_column(heading, overflow="fold")
    for heading in ("operator", "format", "placement"):
        table.add_column(heading, no_wrap=True)
    table.add_column("count", justify="right")
    for heading in ["per node"] if several else [_node_name(plan, index) for index in nodes]:
        table.add_column(heading, justify="right", no_wrap=True)
    devices = sorted({device for module in plan.modules for device in module.device_bytes if device != "cpu"})
    for device in devices:
        table.add_column(device, justify="right", no_wrap=True)
    for group in groups_of(plan):
        first = group[0]
        on_nodes: dict[int, int] = {}
        on_devices: dict[str, int] = {}
        for module in group:
            _add(on_nodes, module.node_bytes)
            for device, amount in module.device_bytes.items():
                on_devices[device] = on_devices.get(device, 0) + amount
        operator = first.operator if first.device == "cpu" else f"{first.operator} on {first.device}"
        amounts = [on_nodes.get(index, 0) for index in nodes]
        cells = [_range(amounts)] if several else [_amount(amount) for amount in amounts]
        table.add_row(
            group_name(module.name for module in group),
            Text(first.rule_id),
            operator,
            first.format,
            "" if first.placement is None else first.placement.policy,
            f"{len(group):,}",
            *cells,
            *(_amount(on_devices.get(device, 0)) for device in devices),
        )
    if not plan.modules:
        table.add_row("nothing is replaced")
    return table


def _rules(plan: Plan) -> list[str]:
    """Every rule that decided something, where it stands and what one token reads of it (the table has no room for that)."""
    read: dict[str, int] = {}
    for module in plan.modules:
        key = f"{module.rule_id}: {module.location}"
        read[key] = read.get(key, 0) + module.bytes_per_token
    return [f"{key}, {format_size(amount)} read per token" if amount else key for key, amount in read.items()]


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory", title_justify="left", title_style="bold", show_edge=False)
    for heading in ("where", "packed", "free", "left"):
        table.add_column(heading, justify="left" if heading == "where" else "right")
    for index, node in enumerate(plan.layout.nodes):
        need = plan.node_bytes.get(index, 0)
        known = node.total_bytes > 0
        table.add_row(
            _node_name(plan, index),
            format_size(need),
            format_size(node.free_bytes) if known else "?",
            _left(node.free_bytes - need) if known else "?",
        )
    for device, amount in sorted(plan.device_bytes.items()):
        table.add_row(device, format_size(amount), "", "")
    free = sum(node.free_bytes for node in plan.layout.nodes)
    known = all(node.total_bytes > 0 for node in plan.layout.nodes)
    table.add_row("kept torch tensors", format_size(plan.kept_bytes), "", "")
    table.add_row(
        "in all",
        format_size(plan.total_bytes),
        format_size(free) if known else "?",
        _left(free - plan.total_bytes) if known else "?",
        style="bold",
    )
    return table


def _kept(plan: Plan) -> Table:
    table = Table(title="Kept", title_justify="left", title_style="bold", show_edge=False)
    for heading in ("modules", "role", "class", "why"):
        table.add_column(heading, overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("bytes", justify="right", no_wrap=True)
    found: dict[tuple[str, ...], list[KeptModule]] = {}
    for module in plan.kept:
        found.setdefault((_key(module.name), module.class_name, module.device, module.why), []).append(module)
    for group in found.values():
        first = group[0]
        table.add_row(
            group_name(module.name for module in group) or "(the model itself)",
            first.role,
            first.class_name,
            first.why if first.device == "cpu" else f"{first.why}, on {first.device}",
            f"{len(group):,}",
            format_size(sum(module.bytes for module in group)),
        )
    return table


def _reasons(plan: Plan) -> list[str]:
    """Every reason that a placement gave, with the modules it holds for."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for module in plan.modules:
        if module.placement is not None and module.placement.reason:
            key = (module.rule_id, module.placement.policy, module.placement.reason)
            found.setdefault(key, []).append(module.name)
    return [
        f"{rule}: {policy} of {len(names):,} module{'s' if len(names) > 1 else ''}: {reason}"
        for (rule, policy, reason), names in found.items()
    ]


def _lines(title: str, lines: Iterable[str], style: str) -> RenderableType:
    return Group(Text(title, style="bold"), *(Text(f"  {line}", style=style) for line in lines))


def _node_name(plan: Plan, index: int) -> str:
    node = plan.layout.nodes[index].os_node
    return f"node {index} (virtual)" if node is None else f"node {node}"


def _amount(amount: int) -> str:
    return format_size(amount) if amount else "-"


def _range(amounts: list[int]) -> str:
    if not any(amounts):
        return "-"
    if min(amounts) == max(amounts):
        return format_size(amounts[0])
    least, most = format_size(min(amounts)), format_size(max(amounts))
    number, unit = least.split()
    return f"{number if most.endswith(f' {unit}') else least}-{most}"


def _left(amount: int) -> str:
    return format_size(amount) if amount >= 0 else f"-{format_size(-amount)}"
