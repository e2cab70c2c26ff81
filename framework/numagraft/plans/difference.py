"""What changes between two plans of one model. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from numagraft.planning import Plan, PlannedModule


@dataclass(frozen=True)
class Change:
    """One module that the two plans treat differently, in words; "kept" where a plan leaves it to torch."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """Changes in model order, and the totals of both plans."""

    changes: tuple[Change, ...]
    node_bytes: tuple[dict[int, int], dict[int, int]]
    kept_bytes: tuple[int, int]
    bytes_per_token: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.changes) or self.node_bytes[0] != self.node_bytes[1] or self.kept_bytes[0] != self.kept_bytes[1]


def difference(before: Plan, after: Plan) -> Difference:
    """Both plans should be of the same model and machine."""
    first = {module.name: module for module in before.modules}
    second = {module.name: module for module in after.modules}
    changes = []
    for name in dict.fromkeys([*first, *second]):
        was, becomes = _words(first.get(name)), _words(second.get(name))
        if was != becomes:
            changes.append(Change(name, was, becomes))
    return Difference(
        tuple(changes),
        (dict(before.node_bytes), dict(after.node_bytes)),
        (before.kept_bytes, after.kept_bytes),
        (before.bytes_per_token, after.bytes_per_token),
    )


def _words(module: PlannedModule | None) -> str:
    if module is None:
        return "kept"
    parts = [module.operator, module.format, "" if module.placement is None else module.placement.policy]
    parts.append("" if module.device == "cpu" else f"on {module.device}")
    return " ".join(part for part in parts if part)
