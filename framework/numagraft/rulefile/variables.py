"""`vars`, and `${vars.name}` or `${runtime.name}` in them and in `replace`. No torch.

OmegaConf resolves; before it sees anything, every interpolation is checked here, with its place: only these two roots, no
resolvers, no cycles, and no expansion that grows without bound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from numagraft.rulefile.nodes import Items, Node, Table, plain
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import Location

#: a reference and nothing else may follow "${"
REFERENCE = re.compile(r"\$\{(vars|runtime)((?:\.[A-Za-z_][A-Za-z0-9_-]*)+)\}")

MAX_VALUES = 2_000
MAX_EXPANSIONS = 2_000
MAX_TEXT = 1 << 16


def check_interpolations(node: Node, problems: Problems) -> None:
    """Adds a problem for every `${` that is no reference to vars or runtime, and for OmegaConf's own marks."""
    if isinstance(node, Table):
        for child in node.entries.values():
            check_interpolations(child, problems)
    elif isinstance(node, Items):
        for child in node.items:
            check_interpolations(child, problems)
    elif isinstance(node.value, str):
        _check_text(node.value, node.location, problems)


def _check_text(text: str, location: Location, problems: Problems) -> None:
    if text == "???":
        problems.add(location, "found the text '???'", "give the value; ??? means a missing one elsewhere")
    for start in (found.start() for found in re.finditer(r"\$\{", text)):
        if REFERENCE.match(text, start):
            if text[max(start - 1, 0)] == "\\":
                problems.add(location, f"found an escaped interpolation in {text!r}", "remove the backslash")
            continue
        end = text.find("}", start)
        found = text[start : end + 1] if end >= 0 else text[start:]
        if ":" in found:
            hint = "resolvers are refused: a rule file reads neither the environment nor anything else"
        else:
            hint = "write ${vars.name} or ${runtime.name}"
        problems.add(location, f"found the interpolation {found!r}, expected one of vars or runtime", hint)


def resolve_vars(table: Table, runtime: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The merged `vars` with every reference put in, as plain data. Adds problems; gives {} when there are any."""
    before = Problems()
    check_interpolations(table, before)
    if _count(table) > MAX_VALUES:
        before.add(table.location, f"more than {MAX_VALUES:,} values in `vars`", "use fewer")
    if not before:
        _check_references(table, runtime, before)
    if before:
        problems.absorb(before)
        return {}
    data = plain(table)
    if not _has_reference(table):
        return data
    from omegaconf import OmegaConf

    container = OmegaConf.create({"vars": data, "runtime": dict(runtime)})
    resolved = OmegaConf.to_container(container, resolve=True)
    return resolved["vars"]


def _count(node: Node) -> int:
    if isinstance(node, Table):
        return 1 + sum(_count(child) for child in node.entries.values())
    if isinstance(node, Items):
        return 1 + sum(_count(child) for child in node.items)
    return 1


def _has_reference(node: Node) -> bool:
    if isinstance(node, Table):
        return any(_has_reference(child) for child in node.entries.values())
    if isinstance(node, Items):
        return any(_has_reference(child) for child in node.items)
    return isinstance(node.value, str) and "${" in node.value


def _check_references(table: Table, runtime: Mapping[str, Any], problems: Problems) -> None:
    """Every reference leads somewhere, none to itself, and what they expand to stays small (a doubling chain of 30 would
    be a gigabyte)."""
    cost: dict[int, tuple[int, int]] = {}  # node -> expansions, characters
    active: list[int] = []

    def visit(node: Node) -> tuple[int, int]:
        if id(node) in cost:
            return cost[id(node)]
        active.append(id(node))
        expansions, size = 1, 0
        if isinstance(node, Table | Items):
            for child in node.entries.values() if isinstance(node, Table) else node.items:
                more, longer = visit(child)
                expansions, size = expansions + more, size + longer
        elif isinstance(node.value, str):
            size = len(node.value)
            for reference in REFERENCE.finditer(node.value):
                target = _target(reference, table, runtime, node.location, problems)
                if target is None:
                    continue
                if id(target) in active:
                    problems.add(node.location, f"{reference[0]} refers to itself", "give it a value")
                    continue
                more, longer = visit(target)
                expansions, size = expansions + more, size + longer
                if expansions > MAX_EXPANSIONS or size > MAX_TEXT:
                    problems.add(
                        node.location,
                        f"{reference[0]} expands too far",
                        f"at most {MAX_EXPANSIONS:,} references and {MAX_TEXT:,} characters",
                    )
                    expansions, size = 1, 0
                    break
        active.pop()
        cost[id(node)] = expansions, size
        return cost[id(node)]

    visit(table)


def _target(
    reference: re.Match[str], table: Table, runtime: Mapping[str, Any], location: Location, problems: Problems
) -> Node | None:
    """The node a reference in `vars` leads to; None for runtime values and unknown names (a problem)."""
    path = reference[2][1:].split(".")
    if reference[1] == "runtime":
        lookup({"runtime": runtime}, reference, location, problems)
        return None
    node: Node | None = table
    for index, key in enumerate(path):
        children = node.entries if isinstance(node, Table) else {}
        if key not in children:
            _unknown(reference[0], key, [*path[:index]], children, location, problems)
            return None
        node = children[key]
    return node


def _unknown(
    text: str, key: str, above: list[str], known: Mapping[str, Any], location: Location, problems: Problems
) -> None:
    where = ".".join(["vars", *above])
    problems.add(location, f"{text}: {where} has no {key!r}", did_you_mean(key, known, otherwise=f"in {where}"))


def lookup(
    scope: Mapping[str, Any], reference: re.Match[str], location: Location, problems: Problems
) -> Any:
    """The value of a reference in {"vars": ..., "runtime": ...}; None and a problem when there is none."""
    value: Any = scope.get(reference[1], {})
    above = [reference[1]]
    for key in reference[2][1:].split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = value if isinstance(value, Mapping) else {}
            where = ".".join(above)
            hint = did_you_mean(key, known, otherwise=f"in {where}")
            problems.add(location, f"{reference[0]}: {where} has no {key!r}", hint)
            return None
        value = value[key]
        above.append(key)
    return value


def substitute(node: Node, scope: Mapping[str, Any], problems: Problems) -> Any:
    """The plain data of `node` with every reference put in; a text that is one reference takes the value's type."""
    if isinstance(node, Table):
        return {key: substitute(child, scope, problems) for key, child in node.entries.items()}
    if isinstance(node, Items):
        return [substitute(child, scope, problems) for child in node.items]
    value = node.value
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return lookup(scope, whole, node.location, problems)

    def text(reference: re.Match[str]) -> str:
        found = lookup(scope, reference, node.location, problems)
        if isinstance(found, Mapping | list | tuple):
            problems.add(node.location, f"{reference[0]} is no single value", "use it alone, without other text")
            return ""
        if isinstance(found, bool):
            return str(found).lower()
        return "" if found is None else str(found)

    return REFERENCE.sub(text, value)
