"""Rules and a model's skeleton in, a Plan out: pure, printable, nothing is changed. Imports torch only for the skeleton."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numagraft.placement import Placement
from numagraft.rulefile.rules import Location
from numagraft.runtime import RuntimeLayout

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from torch import nn

    from numagraft.platform import Platform
    from numagraft.rulefile.rules import RuleSet


@dataclass(frozen=True)
class PlannedModule:
    """One replaced (or kept and moved) module."""

    name: str
    class_name: str
    role: str  # "" where it has none
    rule_id: str
    location: Location
    operator: str  # registered name; "default" keeps the module
    device: str
    params: Any  # an instance of the operator's Params; None for "default"
    placement: Placement | None
    node_bytes: Mapping[int, int]
    device_bytes: Mapping[str, int]
    bytes_per_token: int
    note: str = ""
    added_per_token: int = 0  # float32 values that shards must add up over nodes

    @property
    def format(self) -> str:
        """How weights are stored, for tables: "int4 g32 asymmetric", or "" for operators that keep torch's."""
        label = getattr(self.params, "label", None)
        return label() if callable(label) else str(getattr(self.params, "format", ""))


@dataclass(frozen=True)
class KeptModule:
    """One module with parameters of its own that stays an ordinary torch module, and why."""

    name: str
    class_name: str
    role: str
    device: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Fallback:
    """A rule that gave way because its operator rejected modules (`on_unavailable: next` or `keep`)."""

    rule_id: str
    location: Location
    action: str
    reason: str
    modules: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.modules[:2]) + (", ..." if len(self.modules) > 2 else "")
        done = "kept as torch" if self.action == "keep" else "left to later rules"
        return f"{self.location}: rule {self.rule_id!r}: {len(self.modules):,} {done} ({shown}): {self.reason}"


@dataclass(frozen=True)
class MadeFor:
    """What a plan holds for besides its layout: a saved plan is refused where one of these differs."""

    numagraft: str = ""  # the version that made it
    model_type: str = ""
    dtype: str = ""  # of what stays in torch tensors: "bfloat16"
    isa: tuple[str, ...] = ()  # kernel rows of the CPU, widest first
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of every parameter of the model


@dataclass(frozen=True)
class Plan:
    """What will be done to one model on one platform."""

    model_class: str
    source: str  # the rule file or preset
    layout: RuntimeLayout
    modules: tuple[PlannedModule, ...]
    kept_bytes: int  # parameters and buffers that stay ordinary torch tensors on the CPU
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    node_bytes: Mapping[int, int] = field(default_factory=dict)  # totals by runtime node index
    device_bytes: Mapping[str, int] = field(default_factory=dict)  # totals by torch device, kept and moved ones included
    kept: tuple[KeptModule, ...] = ()
    bytes_per_token: int = 0  # read from packed weights for one token
    made_for: MadeFor = field(default_factory=MadeFor)

    @property
    def total_bytes(self) -> int:
        """Everything in host memory: packed and kept."""
        return sum(self.node_bytes.values()) + self.kept_bytes

    def module(self, name: str) -> PlannedModule:
        """Raises KeyError."""
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)

    def render(self) -> RenderableType:
        """Tables for `rich`: what is replaced, what is kept, what it needs and what is free."""
        from numagraft.plans.table import render

        return render(self)

    def __str__(self) -> str:
        from numagraft.plans.table import as_text

        return as_text(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON with a `schema` number; `from_json` reads it back equal."""
        from numagraft.plans.plan_json import dump

        return dump(self, indent=indent)

    @classmethod
    def from_json(cls, text: str, *, trust_code: bool = False) -> Plan:
        """Raises PlanError when `text` is no plan, was changed since `to_json`, or names operators or kwargs not here."""
        from numagraft.plans.plan_json import load

        return load(text, trust_code=trust_code)

    @classmethod
    def read(cls, path: str | Path, *, trust_code: bool = False) -> Plan:
        """The plan in a file; `from_json` says what is refused."""
        from numagraft.plans.plan_json import read

        return read(path, trust_code=trust_code)


def make_plan(
    model: nn.Module,
    rules: RuleSet,
    platform: Platform,
    *,
    layout: RuntimeLayout | None = None,
    dtype: torch.dtype | None = None,
    check_fit: bool = True,
) -> Plan:
    """What `rules` do to `model` (on meta) on `platform`. `layout` defaults to the rules' `runtime:` on the platform.

    `dtype` is that of kept parameters (default: the skeleton's own). With check_fit, what does not fit in free memory is an
    error that names the nearest change that fits.

    Raises RuleError for rules that match nothing, are shadowed or give wrong kwargs, and PlanError for modules that their
    operator rejects, unmet `requires`, nodes that do not exist and memory that does not suffice; each with every problem.
    """
    from numagraft.plans.planner import Planner

    if layout is None:
        layout = RuntimeLayout.from_platform(platform, rules.runtime)
    planner = Planner(model, rules, platform, layout, dtype)
    plan = planner.plan()
    if check_fit:
        from numagraft.plans.fitting import check_fit as check

        check(plan, planner.placed, platform, rules)
    return plan


def as_plain(value: Any) -> Any:
    """Params as plain data for JSON: dataclasses become dicts, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    return value
