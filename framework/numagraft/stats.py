"""What grafted operators did so far: calls, time, bytes read and remote bytes, per rule and module. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numagraft.errors import ConfigurationError
from numagraft.platform.plain import to_plain
from numagraft.sizes import format_size

if TYPE_CHECKING:
    from torch import nn

    from numagraft.native import NodeStats


@dataclass(frozen=True)
class ModuleStats:
    """One grafted module. `remote_bytes`: read by a worker on another node than the page's; `nodes`: who computed what, by
    runtime node."""

    name: str
    rule_id: str
    operator: str
    calls: int
    seconds: float
    bytes_read: int
    remote_bytes: int
    nodes: tuple[NodeStats, ...] = ()


@dataclass(frozen=True)
class RuleStats:
    """One rule's modules together. Seconds are those inside native calls, added up over modules."""

    rule_id: str
    operator: str
    modules: int
    calls: int
    seconds: float
    bytes_read: int
    remote_bytes: int
    nodes: tuple[NodeStats, ...] = ()

    @property
    def gbps(self) -> float:
        """Weight bytes read per second, in 1e9; 0 before the first call."""
        return self.bytes_read / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def remote_share(self) -> float:
        return self.remote_bytes / self.bytes_read if self.bytes_read else 0.0


@dataclass(frozen=True)
class OperatorTable:
    """A snapshot; `later.since(earlier)` is what happened in between. `str()` is a table, `to_json()` plain data."""

    modules: tuple[ModuleStats, ...]

    @property
    def rules(self) -> tuple[RuleStats, ...]:
        """In the order in which the rules' first modules stand in the model."""
        grouped: dict[tuple[str, str], list[ModuleStats]] = {}
        for module in self.modules:
            grouped.setdefault((module.rule_id, module.operator), []).append(module)
        return tuple(_sum(*key, modules) for key, modules in grouped.items())

    def since(self, earlier: OperatorTable) -> OperatorTable:
        """Raises ConfigurationError when `earlier` is of another model."""
        before = {module.name: module for module in earlier.modules}
        if set(before) != {module.name for module in self.modules}:
            raise ConfigurationError("the earlier snapshot is of another model: its grafted modules differ")
        return OperatorTable(tuple(_difference(module, before[module.name]) for module in self.modules))

    def to_json(self) -> dict[str, Any]:
        """`rules` (with `gbps` and `remote_share`) and `modules`, for json.dumps."""
        rules = [{**to_plain(rule), "gbps": rule.gbps, "remote_share": rule.remote_share} for rule in self.rules]
        return {"rules": rules, "modules": to_plain(self.modules)}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="operators", title_justify="left")
        for heading in ("rule", "operator", "modules", "calls", "time", "read", "GB/s", "remote"):
            table.add_column(heading, justify="left" if heading in ("rule", "operator") else "right", no_wrap=True)
        for rule in self.rules:
            table.add_row(
                rule.rule_id,
                rule.operator,
                f"{rule.modules:,}",
                f"{rule.calls:,}",
                f"{rule.seconds:.3f} s",
                format_size(rule.bytes_read),
                f"{rule.gbps:.1f}",
                f"{rule.remote_share:.1%}",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def operator_stats(model: nn.Module) -> OperatorTable:
    """Counters of every grafted module that counts, in model order.

    Operators that compute in torch do not count and are left out.

    Raises ConfigurationError when `model` was not grafted.

    >>> before = operator_stats(model)                      # doctest: +SKIP
    >>> model.generate(**inputs)                            # doctest: +SKIP
    >>> print(operator_stats(model).since(before))          # doctest: +SKIP
    """
    plan = getattr(model, "numagraft_plan", None)
    if plan is None:
        raise ConfigurationError("this model was not grafted by numagraft: it has no operators to count")
    found = []
    for planned in plan.modules:
        stats = getattr(model.get_submodule(planned.name), "stats", lambda: None)()
        if stats is not None:
            counts = (stats.calls, stats.seconds, stats.bytes_read, stats.remote_bytes, stats.nodes)
            found.append(ModuleStats(planned.name, planned.rule_id, planned.operator, *counts))
    return OperatorTable(tuple(found))


def _sum(rule_id: str, operator: str, modules: Iterable[ModuleStats]) -> RuleStats:
    modules = list(modules)
    return RuleStats(
        rule_id=rule_id,
        operator=operator,
        modules=len(modules),
        calls=sum(module.calls for module in modules),
        seconds=sum(module.seconds for module in modules),
        bytes_read=sum(module.bytes_read for module in modules),
        remote_bytes=sum(module.remote_bytes for module in modules),
        nodes=tuple(_add(nodes) for nodes in zip(*(module.nodes for module in modules if module.nodes), strict=True)),
    )


def _add(nodes: Iterable[NodeStats]) -> NodeStats:
    first, *others = nodes
    for other in others:
        first = first + other
    return first


def _difference(now: ModuleStats, before: ModuleStats) -> ModuleStats:
    return ModuleStats(
        now.name,
        now.rule_id,
        now.operator,
        now.calls - before.calls,
        now.seconds - before.seconds,
        now.bytes_read - before.bytes_read,
        now.remote_bytes - before.remote_bytes,
        tuple(a - b for a, b in zip(now.nodes, before.nodes, strict=True)),
    )
