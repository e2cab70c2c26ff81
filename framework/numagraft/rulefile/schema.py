"""The closed, typed schema of rule files: one literal description that reads nodes and writes the JSON Schema. No torch.

An unknown key is an error with the closest known one. Nothing is coerced: text is text, numbers are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from numagraft.rulefile import comparison, pattern
from numagraft.rulefile.nodes import Items, Leaf, Node, Table, describe
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import Role, Tower
from numagraft.runtime import Pages

INVALID: Any = object()
"""What reading a wrong node gives; its problem has been added."""


class Type:
    """What a node may be: `read` gives its value or INVALID and adds the problem; `json` is its JSON Schema."""

    expected = ""

    def read(self, node: Node, problems: Problems) -> Any:
        raise NotImplementedError

    def json(self) -> dict[str, Any]:
        raise NotImplementedError

    def wrong(self, node: Node, problems: Problems, hint: str = "") -> Any:
        problems.add(node.location, f"found {describe(node)}, expected {self.expected}", hint)
        return INVALID


@dataclass(frozen=True)
class Text(Type):
    """Text, of the form `form` where given."""

    expected: str = "text"
    form: str | None = None
    hint: str = ""
    check: Callable[[str, Leaf, Problems], bool] | None = None

    def read(self, node: Node, problems: Problems) -> Any:
        if not isinstance(node, Leaf) or not isinstance(node.value, str):
            hint = "quote it" if isinstance(node, Leaf) and isinstance(node.value, int | float) else self.hint
            return self.wrong(node, problems, hint)
        if self.form is not None and re.fullmatch(self.form, node.value) is None:
            return self.wrong(node, problems, self.hint)
        if self.check is not None and not self.check(node.value, node, problems):
            return INVALID
        return node.value

    def json(self) -> dict[str, Any]:
        return {"type": "string", **({"pattern": f"^(?:{self.form})$"} if self.form else {})}


@dataclass(frozen=True)
class Choice(Type):
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.words)}"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Leaf) and isinstance(node.value, str):
            if node.value in self.words:
                return node.value
            hint = did_you_mean(node.value, self.words)
            return self.wrong(node, problems, hint if hint.startswith("did") else "")
        return self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class Boolean(Type):
    expected: str = "true or false"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Leaf) and isinstance(node.value, bool):
            return node.value
        word = node.value if isinstance(node, Leaf) and isinstance(node.value, str) else ""
        hint = ""
        if word.lower() in ("yes", "on", "y"):
            hint = f"write true: {word} is text"
        elif word.lower() in ("no", "off", "n"):
            hint = f"write false: {word} is text"
        return self.wrong(node, problems, hint)

    def json(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Integer(Type):
    """A whole number of at least `least`."""

    least: int = 0

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a whole number of at least {self.least}"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Leaf) and type(node.value) is int and node.value >= self.least:
            return node.value
        return self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least}


@dataclass(frozen=True)
class Exactly(Type):
    """One value."""

    value: Any

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.value!r}"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Leaf) and type(node.value) is type(self.value) and node.value == self.value:
            return node.value
        return self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        return {"const": self.value}


@dataclass(frozen=True)
class Compared(Type):
    """A comparison with whole numbers; read as a Comparison."""

    expected: str = comparison.EXPECTED

    def read(self, node: Node, problems: Problems) -> Any:
        value = comparison.Comparison.parse(node.value) if isinstance(node, Leaf) else None
        return self.wrong(node, problems) if value is None else value

    def json(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[<>=!0-9, -]+$"}]}


@dataclass(frozen=True)
class Layers(Type):
    """Layer indices: "0-2,5", 5 or a list of numbers; read as a frozenset."""

    expected: str = 'layer indices such as "0-2,5"'
    LARGEST = 9_999

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Items):
            parts = [self.read(item, problems) for item in node.items]
            return INVALID if INVALID in parts else frozenset().union(*parts)
        if not isinstance(node, Leaf) or isinstance(node.value, bool) or not isinstance(node.value, int | str):
            return self.wrong(node, problems)
        layers: set[int] = set()
        for part in str(node.value).split(","):
            found = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
            if found is None:
                return self.wrong(node, problems)
            begin, end = int(found[1]), int(found[2] or found[1])
            if end < begin:
                problems.add(node.location, f"found the range {begin}-{end}", f"write {end}-{begin}")
                return INVALID
            layers.update(range(begin, end + 1))
        return frozenset(layers)

    def json(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": 0}
        text = {"type": "string", "pattern": r"^\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*$"}
        return {"anyOf": [number, text, {"type": "array", "items": {"anyOf": [number, text]}}]}


@dataclass(frozen=True)
class ListOf(Type):
    """A list, or a single value where `single` is allowed; read as a list of nodes' values."""

    item: Type
    single: bool = False

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.item.expected}, or a list of them" if self.single else "a list"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Items):
            values = [self.item.read(item, problems) for item in node.items]
            return INVALID if any(value is INVALID for value in values) else values
        if self.single and isinstance(node, Leaf) and node.value is not None:
            value = self.item.read(node, problems)
            return INVALID if value is INVALID else [value]
        return self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        many = {"type": "array", "items": self.item.json()}
        return {"anyOf": [self.item.json(), many]} if self.single else many


@dataclass(frozen=True)
class Either(Type):
    """The first of `types` that fits a node's kind."""

    types: tuple[Type, ...]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return " or ".join(type_.expected for type_ in self.types)

    def read(self, node: Node, problems: Problems) -> Any:
        for type_ in self.types:
            value = type_.read(node, Problems())
            if value is not INVALID:
                return value
        return self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        return {"anyOf": [type_.json() for type_ in self.types]}


@dataclass(frozen=True)
class Free(Type):
    """A mapping with names of the user's choice; read as its Table, unresolved."""

    expected: str = "a mapping"
    keys: str = r"[A-Za-z_][A-Za-z0-9_-]*"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Leaf) and node.value is None:
            return Table({}, {}, node.location)
        if not isinstance(node, Table):
            return self.wrong(node, problems)
        for name, place in node.keys.items():
            if re.fullmatch(self.keys, name) is None:
                problems.add(place, f"found the name {name!r}, expected letters, digits, _ and -", "rename it")
        return node

    def json(self) -> dict[str, Any]:
        return {"type": ["object", "null"], "propertyNames": {"pattern": f"^(?:{self.keys})$"}}


@dataclass(frozen=True)
class Field:
    """One key of a record; `doc` is shown by editors."""

    type: Type
    doc: str
    required: bool = False


@dataclass(frozen=True)
class Record(Type):
    """A mapping with exactly these keys; read as a dict of those that are given and right."""

    what: str
    fields: Mapping[str, Field]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.what}: a mapping with {', '.join(self.fields)}"

    def read(self, node: Node, problems: Problems) -> Any:
        if not isinstance(node, Table):
            return self.wrong(node, problems)
        values = {}
        for key, child in node.entries.items():
            if key not in self.fields:
                problems.add(node.keys[key], f"unknown key {key!r} in {self.what}", did_you_mean(key, self.fields))
                continue
            value = self.fields[key].type.read(child, problems)
            if value is not INVALID:
                values[key] = value
        for key, field in self.fields.items():
            if field.required and key not in node.entries:
                problems.add(node.location, f"{self.what} without {key!r}", f"add {key}: {field.type.expected}")
        return values

    def json(self) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: {**field.type.json(), "description": field.doc} for key, field in self.fields.items()},
            "required": [key for key, field in self.fields.items() if field.required],
        }


def _check_pattern(text: str, node: Leaf, problems: Problems) -> bool:
    if "${" in text:
        problems.add(node.location, "an interpolation in `match`", "${...} is allowed in `replace` and `vars` only")
        return False
    try:
        pattern.NamePattern.compile(text)
    except pattern.PatternError as error:
        at = "" if error.position is None else f" at character {error.position + 1} of {text!r}"
        problems.add(node.location, f"{error.message}{at}", error.hint)
        return False
    return True


WHERE = ("in_features", "out_features", "num_experts", "hidden", "intermediate", "parameters", "bias")
"""What `where` can compare: of linear layers, of experts, of any module; `bias` is true or false."""

REQUIREMENTS = (
    "model_type",
    "numa_nodes",
    "sockets",
    "nodes_per_socket",
    "cores",
    "node_memory_gib",
    "memory_gib",
    "gpus",
    "isa",
    "vendor",
    "machine",
    "transformers",
    "numagraft",
)

RULE_ID = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_CLASS = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"

MATCH = Record(
    "match",
    {
        "name": Field(
            Text("a regular expression", check=_check_pattern),
            "regular expression that must match the module's whole qualified name",
        ),
        "class": Field(
            Text("a class name or dotted path", _CLASS, "such as Qwen3MoeExperts or torch.nn.Linear"),
            "class name or dotted path; base classes count",
        ),
        "role": Field(Choice(get_args(Role)), "what the module does, whatever it is called"),
        "layers": Field(Layers(), 'index of the enclosing decoder layer, "0-2,5"'),
        "where": Field(
            Record(
                "where",
                {
                    name: Field(
                        Boolean() if name == "bias" else Compared(), f"compares the module's {name.replace('_', ' ')}"
                    )
                    for name in WHERE
                },
            ),
            'conditions on shapes, such as {in_features: ">=512"}',
        ),
        "tower": Field(Choice((*get_args(Tower), "any")), "which part of a multimodal model; text unless told"),
    },
)
REPLACE = Record(
    "replace",
    {
        "class": Field(
            Text("an operator's name", r"[^\s]+", "such as linear, experts, torch or default"),
            "a registered operator, or default to keep the module",
            required=True,
        ),
        "device": Field(Text("a device such as cpu or cuda:0"), "where it computes"),
        "kwargs": Field(Free(), "the operator's parameters"),
    },
)
RULE = Record(
    "rule",
    {
        "id": Field(
            Text("an id of letters, digits, _ and -", RULE_ID, "overrides address rules by id"), "names the rule"
        ),
        "match": Field(MATCH, "conditions that must all hold"),
        "replace": Field(REPLACE, "what takes the module's place"),
        "recursive": Field(Boolean(), "false: do not look below a kept module"),
        "optional": Field(Boolean(), "true: may match nothing"),
        "expect": Field(Compared(), "how many modules satisfy the conditions"),
        "on_unavailable": Field(
            Choice(("error", "next", "keep")), "when the operator rejects a module: stop, try later rules, or keep it"
        ),
        "override": Field(Boolean(), "true: takes the place of an inherited rule with the same id"),
        "remove": Field(Boolean(), "true: deletes the inherited rule with this id"),
    },
)
RUNTIME = Record(
    "runtime",
    {
        "nodes": Field(
            Either((Exactly("all"), ListOf(Integer(0), single=True))), "kernel node ids to use, or all of them"
        ),
        "threads_per_node": Field(Either((Exactly("auto"), Integer(1))), "auto: one per physical core"),
        "pages": Field(Choice(get_args(Pages)), "page size of packed weights"),
        "strict": Field(Boolean(), "false: report wrong placement instead of raising"),
    },
)
_WORDS = ListOf(Text("a word", r"[A-Za-z0-9_.-]+"), single=True)
_VERSIONS = Text("versions such as >=5.20,<6", r"\s*(~=|==|!=|<=|>=|<|>)[^,]+(,\s*(~=|==|!=|<=|>=|<|>)[^,]+)*")
REQUIRES = Record(
    "requires",
    {
        "model_type": Field(_WORDS, "config.model_type, any of"),
        "numa_nodes": Field(Compared(), "usable NUMA nodes"),
        "sockets": Field(Compared(), "sockets"),
        "nodes_per_socket": Field(Compared(), "NUMA nodes per socket (NPS, SNC)"),
        "cores": Field(Compared(), "physical cores"),
        "node_memory_gib": Field(Compared(), "memory of the smallest node, GiB"),
        "memory_gib": Field(Compared(), "memory of all nodes, GiB"),
        "gpus": Field(Compared(), "GPUs"),
        "isa": Field(_WORDS, "instruction sets, all of"),
        "vendor": Field(_WORDS, "CPU vendor, any of"),
        "machine": Field(_WORDS, "x86_64, aarch64, any of"),
        "transformers": Field(_VERSIONS, "versions of transformers"),
        "numagraft": Field(_VERSIONS, "versions of numagraft"),
    },
)
FILE = Record(
    "rule file",
    {
        "schema": Field(Exactly(1), "version of this language", required=True),
        "description": Field(Text(), "one line for people"),
        "extends": Field(ListOf(Text("a preset's name or ./file.yaml"), single=True), "presets under this file"),
        "requires": Field(REQUIRES, "what machine and model this is for"),
        "vars": Field(Free(), "values for ${vars.name}"),
        "runtime": Field(RUNTIME, "nodes, threads, pages"),
        "rules": Field(ListOf(RULE), "tried in order; the first that matches decides"),
    },
)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of rule files, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "numagraft rule file",
        "description": "Which modules of a model are replaced by which operator, with which placement.",
        **FILE.json(),
    }
