"""Overrides: `--set vars.format=int8`, `overrides=["rules.experts.replace.kwargs.format=bf16"]`. They come last. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numagraft.errors import RuleError
from numagraft.rulefile import schema
from numagraft.rulefile.compose import Composition
from numagraft.rulefile.document import RuleEntry, read_rule
from numagraft.rulefile.nodes import Leaf, Node, Table, from_python, parse
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import Location

EXPECTED = "write vars.NAME=VALUE, runtime.NAME=VALUE or rules.ID.replace.kwargs.NAME=VALUE"


@dataclass(frozen=True)
class Override:
    """One `path=value`; the value is read as YAML."""

    text: str
    path: tuple[str, ...]
    value: Node

    @property
    def location(self) -> Location:
        return Location(f"--set {self.text}", 0, 0)


def read_overrides(given: Sequence[str] | Mapping[str, Any], problems: Problems) -> list[Override]:
    """`given` as on the command line, or a mapping of paths to Python values."""
    found = []
    if isinstance(given, str):
        given = [given]
    pairs = given.items() if isinstance(given, Mapping) else [(text, None) for text in given]
    for text, value in pairs:
        if not isinstance(text, str):
            problems.add(Location("--set", 0, 0), f"found {text!r}", EXPECTED)
            continue
        if isinstance(given, Mapping):
            path, written = text, f"{text}={value}"
        else:
            path, equals, raw = text.partition("=")
            written = text
            if not equals:
                problems.add(Location(f"--set {text}", 0, 0), "no = in it", EXPECTED)
                continue
        location = Location(f"--set {written}", 0, 0)
        keys = tuple(path.strip().split("."))
        if len(keys) < 2 or not all(keys) or keys[0] not in ("vars", "runtime", "rules"):
            problems.add(location, f"{path.strip()!r} cannot be set", EXPECTED)
            continue
        try:
            if isinstance(given, Mapping):
                node = from_python(value, file=location.file)
            else:
                node = parse(raw, file=location.file, within=location) if raw.strip() else Leaf(None, location)
        except RuleError as error:
            for problem in error.problems:
                problems.add(location, problem.message, problem.hint)
            continue
        found.append(Override(written, keys, node))
    return found


def apply_overrides(composition: Composition, overrides: Sequence[Override], problems: Problems) -> Composition:
    """The composition with every override in its place; unknown names are problems."""
    for override in overrides:
        root, *path = override.path
        if root == "vars":
            composition = replace(composition, vars=_set_var(composition.vars, path, override, problems))
        elif root == "runtime":
            if len(path) != 1 or path[0] not in schema.RUNTIME.fields:
                hint = did_you_mean(path[0], schema.RUNTIME.fields)
                problems.add(override.location, f"runtime has no {'.'.join(path)!r}", hint)
                continue
            composition = replace(composition, runtime=composition.runtime.with_entry(path[0], override.value))
        else:
            composition = replace(composition, rules=_set_rule(composition.rules, path, override, problems))
    return composition


def _set_var(table: Table, path: list[str], override: Override, problems: Problems) -> Table:
    key, *rest = path
    child = table.get(key)
    if child is None or (rest and not isinstance(child, Table)):
        hint = did_you_mean(key, table.entries, otherwise="known vars")
        problems.add(override.location, f"no rule file defines the var {'.'.join(override.path[1:])!r}", hint)
        return table
    if not rest:
        return table.with_entry(key, override.value)
    assert isinstance(child, Table)
    return table.with_entry(key, _set_var(child, rest, override, problems))


def _set_rule(
    rules: tuple[RuleEntry, ...], path: list[str], override: Override, problems: Problems
) -> tuple[RuleEntry, ...]:
    id_, *rest = path
    index = next((i for i, entry in enumerate(rules) if entry.id == id_), None)
    if index is None:
        hint = did_you_mean(id_, [entry.id for entry in rules], otherwise="ids")
        problems.add(override.location, f"no rule has the id {id_!r}", hint)
        return rules
    if not rest or not _settable(rest):
        known = "replace.class, replace.device, replace.kwargs.NAME, optional, expect, on_unavailable, recursive"
        problems.add(override.location, f"a rule has no {'.'.join(rest)!r}" if rest else "no key", f"one of {known}")
        return rules
    entry = rules[index]
    own = Problems()
    node = _with_path(entry.node, rest, override.value)
    schema.RULE.read(node, own)
    changed = read_rule(node, file=entry.file, index=index, problems=own, trusted=entry.trusted)
    problems.absorb(own)
    return (*rules[:index], replace(changed, id=entry.id), *rules[index + 1 :])


def _settable(path: list[str]) -> bool:
    if path[:2] == ["replace", "kwargs"]:
        return len(path) > 2
    if path[0] in ("replace", "match"):
        record = schema.REPLACE if path[0] == "replace" else schema.MATCH
        return len(path) == 2 and path[1] in record.fields and path[1] != "kwargs"
    return len(path) == 1 and path[0] in ("optional", "expect", "on_unavailable", "recursive")


def _with_path(table: Table, path: list[str], value: Node) -> Table:
    key, *rest = path
    if not rest:
        return table.with_entry(key, value)
    child = table.get(key)
    if not isinstance(child, Table):
        child = Table({}, {}, value.location)
    return table.with_entry(key, _with_path(child, rest, value))
