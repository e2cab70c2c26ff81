"""A resolved rule set written out again as YAML, with where every value comes from beside it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from numagraft.rulefile.rules import Location, Rule, RuleSet


def to_yaml(rules: RuleSet, *, origins: bool = True) -> str:
    """A rule file that extends nothing and means the same; with `origins`, each value's place as a comment.

    Raises nothing; loading the text gives rules that differ only in their places.
    """
    lines: list[tuple[str, Location | None]] = [("schema: 1", None)]
    if rules.description:
        lines.append((f"description: {_scalar(rules.description)}", None))
    if rules.requires:
        lines.append(("requires:", None))
        for key, group in _requires(rules).items():
            lines.append((f"  {key}: {_scalar(group[0])}", group[1]))
    if rules.vars:
        lines.append(("vars:", None))
        _mapping(rules.vars, "vars", 1, rules.marks, lines)
    runtime = {
        "nodes": list(rules.runtime.nodes) if isinstance(rules.runtime.nodes, tuple) else rules.runtime.nodes,
        "threads_per_node": rules.runtime.threads_per_node,
        "pages": rules.runtime.pages,
        "strict": rules.runtime.strict,
    }
    lines.append(("runtime:", None))
    _mapping(runtime, "runtime", 1, rules.marks, lines)
    lines.append(("rules:", None))
    for rule in rules.rules:
        _rule(rule, lines)
    width = min(max((len(text) for text, place in lines if place), default=0), 100)
    return "".join(
        f"{text:<{width}}  # {place}\n" if origins and place is not None else f"{text}\n" for text, place in lines
    )


def _requires(rules: RuleSet) -> dict[str, tuple[Any, Location]]:
    """Requirements by key; those of one key, which must all hold, join where they can (the nearest stands for a list)."""
    found: dict[str, tuple[Any, Location]] = {}
    for requirement in rules.requires:
        value = requirement.value if isinstance(requirement.value, list | str) else str(requirement.value)
        before = found.get(requirement.key)
        if before is None:
            found[requirement.key] = (value, requirement.location)
        elif isinstance(value, str):
            found[requirement.key] = (f"{before[0]},{value}", before[1])
        elif requirement.key == "isa":
            found[requirement.key] = ([*dict.fromkeys([*before[0], *value])], before[1])
        else:
            found[requirement.key] = ([item for item in before[0] if item in value], before[1])
    return found


def _rule(rule: Rule, lines: list[tuple[str, Location | None]]) -> None:
    match: dict[str, Any] = {}
    for key, value in (("name", rule.match.name), ("class", rule.match.class_name), ("role", rule.match.role)):
        if value is not None:
            match[key] = value
    if rule.match.layers is not None:
        match["layers"] = ranges(rule.match.layers)
    if rule.match.where:
        match["where"] = {key: value == "true" if key == "bias" else value for key, value in rule.match.where.items()}
    if rule.match.tower != "text":
        match["tower"] = rule.match.tower
    replace: dict[str, Any] = {"class": rule.replace.operator}
    if rule.replace.device is not None:
        replace["device"] = rule.replace.device
    if rule.replace.kwargs:
        replace["kwargs"] = dict(rule.replace.kwargs)
    head: dict[str, Any] = {"match": match, "replace": replace}
    for key, value, default in (
        ("recursive", rule.recursive, True),
        ("optional", rule.optional, False),
        ("expect", rule.expect, None),
        ("on_unavailable", rule.on_unavailable, "error"),
    ):
        if value != default:
            head[key] = value
    named = all(character.isalnum() or character in "_-" for character in rule.id)
    if named:
        lines.append((f"  - id: {_scalar(rule.id)}", rule.location))
        _mapping(head, "", 2, rule.marks, lines)
        return
    at = len(lines)
    _mapping(head, "", 2, rule.marks, lines)
    text, place = lines[at]
    lines[at] = (f"  - {text.lstrip()}", place)


def ranges(layers: frozenset[int]) -> str:
    """Layer indices as a rule writes them.

    >>> ranges(frozenset({0, 1, 2, 5}))
    '0-2,5'
    """
    parts: list[str] = []
    ordered = sorted(layers)
    for index, layer in enumerate(ordered):
        if index and ordered[index - 1] == layer - 1:
            begin = parts[-1].split("-")[0]
            parts[-1] = f"{begin}-{layer}"
        else:
            parts.append(str(layer))
    return ",".join(parts)


def _mapping(
    values: Mapping[str, Any],
    path: str,
    depth: int,
    marks: Mapping[str, Location],
    lines: list[tuple[str, Location | None]],
) -> None:
    for key, value in values.items():
        below = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            lines.append((f"{'  ' * depth}{key}:", None))
            _mapping(value, below, depth + 1, marks, lines)
        else:
            lines.append((f"{'  ' * depth}{key}: {_scalar(value)}", marks.get(below)))


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        from numagraft.rulefile.nodes import plain_scalar

        text = yaml.safe_dump(value, width=10_000, allow_unicode=True).strip().removesuffix("\n...").strip()
        safe = text == value and isinstance(plain_scalar(value), str) and not any(c in value for c in ":#{}[],&*!|>%@`'\"\\")
        return text if safe else "'" + value.replace("'", "''") + "'" if "\n" not in value else yaml.safe_dump(
            value, default_style='"', width=10_000
        ).strip()
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()


__all__ = ["ranges", "to_yaml"]
