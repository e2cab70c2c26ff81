"""One rule file as read: typed where types are known, nodes where variables are still to be put in. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from numagraft.rulefile import schema
from numagraft.rulefile.nodes import Items, Leaf, Node, Table
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Location, Requirement

CONDITIONS = ("name", "class", "role", "layers", "where")


@dataclass(frozen=True)
class RuleEntry:
    """One entry of `rules:` in one file."""

    id: str
    node: Table
    values: dict[str, Any]
    file: str
    trusted: bool = False  # may name a class by its dotted path

    @property
    def location(self) -> Location:
        return self.node.location

    @property
    def override(self) -> bool:
        return bool(self.values.get("override", False))

    @property
    def remove(self) -> bool:
        return bool(self.values.get("remove", False))


@dataclass(frozen=True)
class Document:
    """One file: what it says itself, nothing inherited. `directory` is where its relative `extends` start (None: nowhere)."""

    file: str
    description: str = ""
    extends: tuple[tuple[str, Location], ...] = ()
    requires: tuple[Requirement, ...] = ()
    vars: Table | None = None
    runtime: Table | None = None
    rules: tuple[RuleEntry, ...] = ()
    directory: str | None = None
    node: Node | None = field(default=None, repr=False)


def read_document(
    node: Node, *, file: str, problems: Problems, trusted: bool, directory: str | None = None, python: bool = False
) -> Document:
    """The file in `node`; everything that is wrong goes to `problems`. Data from Python may leave `schema` out."""
    if python and isinstance(node, Items):
        node = Table({"rules": node}, {"rules": node.location}, node.location)
    if isinstance(node, Items):
        problems.add(
            node.location,
            "found a list, expected a mapping with schema, rules, ...",
            "a rule file of KTransformers? convert it: numagraft rules import FILE",
        )
        return Document(file, directory=directory)
    if python and isinstance(node, Table) and "schema" not in node.entries:
        node = node.with_entry("schema", Leaf(1, node.location))
    values = schema.FILE.read(node, problems)
    if values is schema.INVALID:
        return Document(file, directory=directory)
    assert isinstance(node, Table)

    def subtable(key: str) -> Table | None:
        child = node.get(key)
        return child if isinstance(child, Table) else None

    requires = subtable("requires")
    requirements = tuple(
        Requirement(key, value, requires.keys[key]) for key, value in values.get("requires", {}).items() if requires
    )
    rules = node.get("rules")
    entries = []
    if isinstance(rules, Items):
        for index, item in enumerate(rules.items):
            if isinstance(item, Table):
                entries.append(read_rule(item, file=file, index=index, problems=problems, trusted=trusted))
    _check_unique(entries, problems)
    return Document(
        file=file,
        description=values.get("description", ""),
        extends=_extends(node),
        requires=requirements,
        vars=subtable("vars"),
        runtime=subtable("runtime"),
        rules=tuple(entries),
        directory=directory,
        node=node,
    )


def _extends(node: Table) -> tuple[tuple[str, Location], ...]:
    child = node.get("extends")
    leaves = child.items if isinstance(child, Items) else (child,)
    return tuple((leaf.value, leaf.location) for leaf in leaves if isinstance(leaf, Leaf) and isinstance(leaf.value, str))


def read_rule(node: Table, *, file: str, index: int, problems: Problems, trusted: bool) -> RuleEntry:
    """One rule. What single keys cannot say is checked here: a rule has conditions and a replacement, or removes one.

    The types of its keys were checked when the file was read; `values` holds those that are right.
    """
    values = schema.RULE.read(node, Problems())
    id_ = values.get("id")
    if id_ is None:
        place = node.location
        id_ = f"{PurePath(file).name}:{place.line}" if place.line else f"rule-{index + 1}"
    if values.get("remove"):
        extra = [key for key in node.entries if key not in ("id", "remove")]
        if extra:
            problems.add(node.keys[extra[0]], f"{extra[0]!r} in a rule with `remove: true`", "keep only its id")
        if "id" not in node.entries:
            problems.add(node.location, "`remove: true` without an id", "name the inherited rule: id: ...")
    else:
        for key in ("match", "replace"):
            if key not in node.entries:
                known = schema.RULE.fields[key].type.expected
                problems.add(node.location, f"rule without {key!r}", f"add {known}")
        match = node.get("match")
        if isinstance(match, Table) and not any(key in match.entries for key in CONDITIONS):
            problems.add(match.location, "match without a condition", f"give one of {', '.join(CONDITIONS)}")
    return RuleEntry(id=id_, node=node, values=values, file=file, trusted=trusted)


def _check_unique(entries: list[RuleEntry], problems: Problems) -> None:
    seen: dict[str, RuleEntry] = {}
    for entry in entries:
        if entry.id in seen:
            place = entry.node.keys.get("id", entry.location)
            problems.add(place, f"the id {entry.id!r} a second time", f"first at {seen[entry.id].location}")
        seen.setdefault(entry.id, entry)
