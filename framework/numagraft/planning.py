"""Rules and a model's skeleton in, a Plan out: pure, printable, nothing is changed. Imports torch only for the skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numagraft.placement import Placement
from numagraft.rulefile.rules import Location
from numagraft.runtime import RuntimeLayout

# make_plan(model: nn.Module on meta, rules: RuleSet, platform: Platform, *, layout: RuntimeLayout | None = None,
#           dtype: torch.dtype | None = None, check_fit: bool = True) -> Plan
#     raises PlanError / RuleError with every problem (unmatched rule, rejected module, kwargs, does not fit)


@dataclass(frozen=True)
class PlannedModule:
    """One replaced (or kept and moved) module."""

    name: str
    class_name: str
    role: str
    rule_id: str
    location: Location
    operator: str  # registered name; "default" keeps the module
    device: str
    params: Any  # an instance of the operator's Params
    placement: Placement | None
    node_bytes: Mapping[int, int]
    device_bytes: Mapping[str, int]
    bytes_per_token: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What will be done to one model on one platform."""

    model_class: str
    source: str  # the rule file or preset
    layout: RuntimeLayout
    modules: tuple[PlannedModule, ...]
    kept_bytes: int  # parameters that stay ordinary torch tensors
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    node_bytes: Mapping[int, int] = field(default_factory=dict)  # totals by runtime node index
