"""What a rule file means once it is read, composed and resolved: plain frozen data. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from numagraft.runtime import RuntimeSettings


@dataclass(frozen=True, order=True)
class Location:
    """Where something stands in a rule file; `line` and `column` count from 1. Overrides have the file "--set"."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


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


@dataclass(frozen=True)
class RuleSet:
    """A whole, flat, resolved rule file: `rules` in the order in which they are tried."""

    source: str
    description: str = ""
    requires: Mapping[str, Any] = field(default_factory=dict)
    vars: Mapping[str, Any] = field(default_factory=dict)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    rules: tuple[Rule, ...] = ()
