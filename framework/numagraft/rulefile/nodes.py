"""YAML text (or plain Python data) as a tree of nodes that know where they stand. No torch.

A small, safe subset of YAML 1.2 with the core schema: mappings with unique plain-text keys, sequences, scalars. Anchors,
aliases, merge keys, tags and several documents are refused, so a tree is never larger than its text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from numagraft.errors import RuleError
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Location

MAX_BYTES = 1 << 20
MAX_DEPTH = 24
MAX_NODES = 50_000


@dataclass(frozen=True)
class Leaf:
    """A scalar, resolved by the core schema when plain: `value` is a str, int, float, bool or None (or any Python object
    when the rules came from Python)."""

    value: Any
    location: Location


@dataclass(frozen=True)
class Items:
    """A sequence."""

    items: tuple[Node, ...]
    location: Location


@dataclass(frozen=True)
class Table:
    """A mapping; keys are unique text, in file order, each with its own place."""

    entries: dict[str, Node]
    keys: dict[str, Location]
    location: Location

    def get(self, key: str) -> Node | None:
        return self.entries.get(key)

    def with_entry(self, key: str, node: Node) -> Table:
        """A copy in which `key` holds `node`."""
        return Table({**self.entries, key: node}, {**self.keys, key: node.location}, self.location)


Node = Leaf | Items | Table

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def plain_scalar(text: str) -> Any:
    """What an unquoted scalar means: YAML 1.2's core schema, decimal only (`yes`, `1_0`, `0x10`, `010`, `2:30` are text)."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if len(text) <= 64:
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
            return float(text)
    return text


def describe(node: Node) -> str:
    """What was found, for an error: `the text 'int9'`, `a mapping`."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    return describe_value(node.value)


def describe_value(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a Python {type(value).__name__}"


def plain(node: Node) -> Any:
    """The tree as dicts, lists and values."""
    if isinstance(node, Table):
        return {key: plain(value) for key, value in node.entries.items()}
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return node.value


def read_text(path: Path, *, location: Location | None = None) -> str:
    """The file's text. Raises RuleError when it is missing, no regular file, too large or not UTF-8."""
    where = str(location or path)

    def fail(message: str, hint: str = "") -> RuleError:
        problems = Problems()
        problems.add(location or Location(str(path), 0, 0), message, hint)
        try:
            problems.raise_if_any(where if location is None else location.file)
        except RuleError as error:
            return error
        raise AssertionError

    try:
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
            raise fail(f"{path} {kind}", "give the path of a rule file, or the name of a preset (`numagraft rules list`)")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise fail(f"{path} has {size:,} bytes", f"a rule file may have {MAX_BYTES:,}: is this a rule file?")
        data = path.read_bytes()
    except OSError as error:
        raise fail(f"{path} cannot be read: {error.strerror or error}") from error
    return decode(data, file=str(path))


def decode(data: bytes, *, file: str) -> str:
    """UTF-8 text. Raises RuleError with the line and column of the first byte that is not."""
    problems = Problems()
    if len(data) > MAX_BYTES:
        problems.add(Location(file, 0, 0), f"{len(data):,} bytes", f"a rule file may have {MAX_BYTES:,}")
        problems.raise_if_any(file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        head = data[: error.start]
        line, column = head.count(b"\n") + 1, error.start - (head.rfind(b"\n") + 1) + 1
        problems.add(
            Location(file, line, column),
            f"byte 0x{data[error.start]:02x} is not UTF-8",
            "save the file as UTF-8",
        )
    problems.raise_if_any(file)
    raise AssertionError


class _Refused(Exception):
    def __init__(self, location: Location, message: str, hint: str = "") -> None:
        self.problem = (location, message, hint)


def parse(text: str, *, file: str, line_map: Sequence[int] | None = None, within: Location | None = None) -> Node:
    """The one document in `text`. `line_map[i]` is the template line that rendered line i + 1 came from; `within` stands in
    for every place (a value given on the command line).

    Raises RuleError on bad YAML, on what the subset leaves out and on a tree too deep or too large; duplicate keys are all
    collected first.
    """
    problems = Problems()

    def locate(mark: yaml.Mark | None) -> Location:
        if within is not None:
            return within
        if mark is None:
            return Location(file, 1, 1)
        line = mark.line + 1
        if line_map is not None:
            return Location(file, line_map[min(mark.line, len(line_map) - 1)], mark.column + 1, rendered=line)
        return Location(file, line, mark.column + 1)

    node: Node | None = None
    try:
        if len(text) > MAX_BYTES:
            raise _Refused(Location(file, 1, 1), f"{len(text):,} characters", f"a rule file may have {MAX_BYTES:,}")
        node = _Builder(text, locate, problems).document()
    except _Refused as refused:
        problems.add(*refused.problem)
    except yaml.reader.ReaderError as error:
        head = text[: error.position]
        line = head.count("\n")
        mark = yaml.Mark(file, error.position, line, error.position - (head.rfind("\n") + 1), None, 0)
        problems.add(locate(mark), f"character U+{_code(error.character):04X} is not allowed", "remove it")
    except yaml.MarkedYAMLError as error:
        message, hint = _explain(error, text)
        problems.add(locate(error.problem_mark or error.context_mark), message, hint)
    except yaml.YAMLError as error:
        problems.add(Location(file, 1, 1), f"bad YAML: {error}")
    problems.raise_if_any(file)
    assert node is not None
    return node


def _code(character: Any) -> int:
    return character if isinstance(character, int) else ord(character)


def _explain(error: yaml.MarkedYAMLError, text: str) -> tuple[str, str]:
    """PyYAML's complaint, and what to do where the cause is one of the usual ones."""
    message = f"bad YAML: {error.problem or error.context}"
    line = ""
    if error.problem_mark is not None:
        lines = text.splitlines()
        line = lines[error.problem_mark.line] if error.problem_mark.line < len(lines) else ""
    if line[: len(line) - len(line.lstrip())].count("\t") or "'\\t'" in message:
        return message, "indent with spaces: YAML forbids tabs"
    if "escape character" in message:
        return message, "put patterns in single quotes: '\\.' is an error in double ones"
    if re.search(r":\s*>\s*=?\s*\d", line):
        return message, 'quote comparisons: ">=1" (an unquoted > starts a block of text)'
    if re.search(r"\{\s*\d+\s*,\s*\d*\s*\}", line):
        return message, "put patterns in single quotes: {1,2} inside a flow mapping is YAML's own syntax"
    if "could not find expected ':'" in message or "mapping values are not allowed" in message:
        return message, "quote values that hold ': ' or ' #', and put each key on its own line"
    return message, ""


class _Builder:
    """Builds nodes from PyYAML's events, refusing what the subset leaves out as soon as it is seen."""

    def __init__(self, text: str, locate: Any, problems: Problems) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self._loader = loader(text)
        self._locate = locate
        self._problems = problems
        self._count = 0

    def document(self) -> Node:
        try:
            self._next()  # stream start
            event = self._next()
            if isinstance(event, yaml.StreamEndEvent):
                raise _Refused(self._locate(event.start_mark), "the file is empty", "expected a mapping with `rules:`")
            node = self._node(self._next(), 0)
            self._next()  # document end
            event = self._next()
            if not isinstance(event, yaml.StreamEndEvent):
                raise _Refused(
                    self._locate(event.start_mark), "a second YAML document", "a rule file is one document: remove `---`"
                )
            return node
        finally:
            self._loader.dispose()

    def _next(self) -> Any:
        return self._loader.get_event()

    def _node(self, event: Any, depth: int) -> Node:
        location = self._locate(event.start_mark)
        self._count += 1
        if self._count > MAX_NODES:
            raise _Refused(location, f"more than {MAX_NODES:,} values", "split the file, or use patterns")
        if depth > MAX_DEPTH:
            raise _Refused(location, f"nested more than {MAX_DEPTH} levels deep", "rules need five")
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(location, f"the alias *{event.anchor}", "aliases are not allowed: use `vars` and ${vars.name}")
        if event.anchor is not None:
            raise _Refused(location, f"the anchor &{event.anchor}", "anchors are not allowed: use `vars` and ${vars.name}")
        implicit = event.implicit[0] or event.implicit[1] if isinstance(event.implicit, tuple) else event.implicit
        if event.tag is not None and not (implicit and event.tag == "!"):
            raise _Refused(location, f"the tag {event.tag}", "tags are not allowed: a rule file is data only")
        if isinstance(event, yaml.ScalarEvent):
            return Leaf(plain_scalar(event.value) if not event.style else event.value, location)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                items.append(self._node(event, depth + 1))
            return Items(tuple(items), location)
        return self._table(location, depth)

    def _table(self, location: Location, depth: int) -> Table:
        entries: dict[str, Node] = {}
        keys: dict[str, Location] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if not isinstance(key, Leaf):
                raise _Refused(key.location, f"{describe(key)} as a key", "a key is text")
            # `on`, `yes` or 5 as a key is the text it looks like
            name = event.value
            if name == "<<" and not event.style:
                raise _Refused(key.location, "a merge key (<<)", "merge keys are not allowed: use `extends` or `vars`")
            value = self._node(self._next(), depth + 1)
            if name in entries:
                self._problems.add(key.location, f"the key {name!r} a second time", f"first at {keys[name]}: remove one")
                continue
            entries[name] = value
            keys[name] = key.location
        return Table(entries, keys, location)


def from_python(value: Any, *, file: str, path: str = "") -> Node:
    """The tree of rules given as Python data; places are paths such as `rules[0].match.name`.

    Raises RuleError for keys that are not text and for data nested too deep (or in itself).
    """
    problems = Problems()
    count = 0

    def build(value: Any, path: str, depth: int) -> Node:
        nonlocal count
        count += 1
        location = Location(f"{file}: {path}" if path else file, 0, 0)
        if depth > MAX_DEPTH or count > MAX_NODES:
            problems.add(location, f"nested more than {MAX_DEPTH} levels deep or more than {MAX_NODES:,} values")
            return Leaf(None, location)
        if isinstance(value, Mapping):
            entries: dict[str, Node] = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    problems.add(location, f"{describe_value(key)} as a key", "a key is text")
                    continue
                entries[key] = build(item, f"{path}.{key}" if path else key, depth + 1)
            return Table(entries, {key: node.location for key, node in entries.items()}, location)
        if isinstance(value, list | tuple):
            return Items(tuple(build(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)), location)
        return Leaf(value, location)

    node = build(value, path, 0)
    problems.raise_if_any(file)
    return node
