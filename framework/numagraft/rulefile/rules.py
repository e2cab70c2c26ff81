"""What a rule file means once it is read, composed and resolved: plain frozen data. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from numagraft.runtime import RuntimeSettings

Role = Literal[
    "embedding",
    "lm_head",
    "decoder_layer",
    "attention",
    "mlp",
    "moe",
    "router",
    "experts",
    "shared_experts",
    "shared_expert_gate",
    "norm",
    "linear",
]
Tower = Literal["text", "vision", "audio"]

#: the operator name that keeps a module as it is
DEFAULT = "default"


@dataclass(frozen=True, order=True)
class Location:
    """Where something stands in a rule file; `line` and `column` count from 1.

    Line 0 means that `file` says it all: an override ("--set vars.format=int8") or rules given as Python data. Of a
    template, `line` is the template's and `rendered` the line of the text that it rendered to.
    """

    file: str
    line: int
    column: int
    rendered: int | None = None

    def __str__(self) -> str:
        if not self.line:
            return self.file
        text = f"{self.file}:{self.line}:{self.column}"
        return text if self.rendered is None else f"{text} (rendered line {self.rendered})"


@dataclass(frozen=True)
class Match:
    """The conditions of a rule; every one that is given must hold."""

    name: str | None = None  # a regex that must match the whole qualified name
    class_name: str | None = None  # a class name or dotted path, looked up through the MRO
    role: str | None = None
    layers: frozenset[int] | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    tower: Literal["text", "vision", "audio", "any"] = "text"


@dataclass(frozen=True)
class Replace:
    """`operator` is a registered name, "default" (keep the module) or, with trust_code, a dotted path."""

    operator: str
    device: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    id: str
    match: Match
    replace: Replace
    location: Location
    recursive: bool = True
    optional: bool = False
    expect: str | None = None
    on_unavailable: Literal["error", "next", "keep"] = "error"
    inherited: bool = False  # from an extended preset
    marks: Mapping[str, Location] = field(default_factory=dict)  # "replace.kwargs.format" -> where it stands
    references: Mapping[str, str] = field(default_factory=dict)  # "replace.kwargs.format" -> the "vars.format" it names

    def mark(self, path: str) -> Location:
        """Where `path` ("match.name") stands, or the nearest thing above it."""
        while path:
            if path in self.marks:
                return self.marks[path]
            path = path.rpartition(".")[0]
        return self.location


@dataclass(frozen=True)
class Requirement:
    """One line of a `requires:` block; all lines of all composed files must hold."""

    key: str
    value: Any
    location: Location


@dataclass(frozen=True)
class RuleSet:
    """A whole, flat, resolved rule file: `rules` in the order in which they are tried."""

    source: str
    description: str = ""
    requires: tuple[Requirement, ...] = ()
    vars: Mapping[str, Any] = field(default_factory=dict)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    rules: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = ()  # how a preset was chosen, what an override replaced
    marks: Mapping[str, Location] = field(default_factory=dict)  # "vars.format", "runtime.pages" -> where they stand
    files: tuple[str, ...] = ()  # every file that it was composed of, the nearest first

    def rule(self, id: str) -> Rule:
        """Raises KeyError."""
        for rule in self.rules:
            if rule.id == id:
                return rule
        raise KeyError(id)
