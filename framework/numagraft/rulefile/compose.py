"""Puts a rule file and everything it extends into one: who inherits from whom, and who wins. No torch.

The files are ordered so that each comes after all that it extends, the last-listed nearer than those before it; a file that
is reached twice counts once, at its farthest place. The nearer file wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numagraft.rulefile.document import Document, RuleEntry
from numagraft.rulefile.nodes import Node, Table
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import Location, Requirement

MAX_FILES = 32

Resolve = Callable[[str, Location, Document], Document | None]
"""Finds and reads what `extends` names: name, place and the naming document; None when a problem was added."""


@dataclass(frozen=True)
class Composition:
    """All files as one. `rules` are in the order in which they are tried."""

    documents: tuple[Document, ...]  # the nearest first
    requires: tuple[Requirement, ...]
    vars: Table
    runtime: Table
    rules: tuple[RuleEntry, ...]


def linearize(root: Document, resolve: Resolve, problems: Problems) -> list[Document]:
    """Every file, the farthest first and `root` last. Cycles and too many files are problems."""
    order: list[Document] = []
    done: dict[str, Document] = {}
    path: list[str] = []
    count = 1

    def visit(document: Document) -> None:
        nonlocal count
        path.append(document.file)
        for name, place in document.extends:
            base = resolve(name, place, document)
            if base is None:
                continue
            if base.file in path:
                chain = " -> ".join([*path[path.index(base.file) :], base.file])
                problems.add(place, f"{name!r} extends itself: {chain}", "remove one of these `extends`")
                continue
            if base.file in done:
                continue
            count += 1
            if count > MAX_FILES:
                if count == MAX_FILES + 1:
                    problems.add(place, f"more than {MAX_FILES} files", "compose fewer presets")
                return
            visit(base)
        path.pop()
        done[document.file] = document
        order.append(document)

    visit(root)
    return order


def compose(documents: Sequence[Document], problems: Problems) -> Composition:
    """`documents` from the farthest to the nearest, as `linearize` gives them."""
    rules: list[RuleEntry] = []
    for document in documents:
        rules = _layer(document, rules, problems)
    empty = Table({}, {}, documents[-1].rules[0].location if documents[-1].rules else Location(documents[-1].file, 0, 0))
    vars_, runtime = empty, empty
    for document in documents:
        if document.vars is not None:
            vars_ = merge(vars_, document.vars)
        if document.runtime is not None:
            runtime = merge(runtime, document.runtime)
    requires = tuple(requirement for document in reversed(documents) for requirement in document.requires)
    return Composition(tuple(reversed(documents)), requires, vars_, runtime, tuple(rules))


def merge(base: Table, nearer: Table) -> Table:
    """Per key the nearer file wins; mappings merge, everything else is replaced."""
    entries: dict[str, Node] = dict(base.entries)
    keys = dict(base.keys)
    for key, node in nearer.entries.items():
        before = entries.get(key)
        entries[key] = merge(before, node) if isinstance(before, Table) and isinstance(node, Table) else node
        keys[key] = nearer.keys[key]
    return Table(entries, keys, nearer.location)


def _layer(document: Document, inherited: list[RuleEntry], problems: Problems) -> list[RuleEntry]:
    """This file's rules over the inherited ones: new ones first, overriding ones in the place of what they override."""
    result = list(inherited)
    own: list[RuleEntry] = []
    for entry in document.rules:
        index = next((i for i, other in enumerate(result) if other.id == entry.id), None)
        place = entry.node.keys.get("id", entry.location)
        ids = [other.id for other in inherited]
        if entry.remove:
            if index is None:
                problems.add(place, f"`remove` of {entry.id!r}, but no inherited rule has this id", _ids(entry.id, ids))
            else:
                del result[index]
        elif index is None:
            if entry.override:
                problems.add(place, f"`override` of {entry.id!r}, but no inherited rule has this id", _ids(entry.id, ids))
            own.append(entry)
        elif entry.override:
            result[index] = entry
        else:
            problems.add(
                place,
                f"the id {entry.id!r} is already that of {result[index].location}",
                "add `override: true` to take its place, or choose another id",
            )
    return own + result


def _ids(id_: str, ids: list[str]) -> str:
    return did_you_mean(id_, ids, otherwise="inherited ids")
