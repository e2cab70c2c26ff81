"""Puts planned operators into a skeleton, in place of the modules they replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from numagraft.contract import Operator
from numagraft.crossings import KEEP
from numagraft.errors import PlanError, Problem
from numagraft.registry import operator_class

if TYPE_CHECKING:
    from numagraft.native import Runtime
    from numagraft.planning import Plan, PlannedModule


@dataclass(frozen=True)
class Grafts:
    """The operators in a model: by module name, and the owner of each parameter name as (module name, local name)."""

    operators: Mapping[str, Operator]
    planned: Mapping[str, PlannedModule]
    owners: Mapping[str, tuple[str, str]]


def make_operators(model: nn.Module, plan: Plan, runtime: Runtime | None) -> Grafts:
    """Every planned operator, made from `model`'s modules on the meta device; the model is not touched.

    Raises PlanError when the plan names modules that the model lacks, or when an operator keeps no placeholder for a
    parameter (the loader would then drop its weight in silence).
    """
    operators: dict[str, Operator] = {}
    planned: dict[str, PlannedModule] = {}
    owners: dict[str, tuple[str, str]] = {}
    problems: list[Problem] = []
    modules = dict(model.named_modules())
    for each in plan.modules:
        if each.operator == KEEP:
            continue
        module = modules.get(each.name)
        if module is None:
            problems.append(
                Problem(str(each.location), f"the plan replaces {each.name}, which this model does not have")
            )
            continue
        operator = operator_class(each.operator).from_module(
            module,
            each.params,
            name=each.name,
            placement=each.placement,
            runtime=runtime if each.placement is not None else None,
            device=each.device,
        )
        wanted = {name: tuple(parameter.shape) for name, parameter in module.state_dict(keep_vars=True).items()}
        kept = {name: tuple(parameter.shape) for name, parameter in operator.state_dict(keep_vars=True).items()}
        if wanted != kept:
            differing = sorted(name for name in wanted.keys() | kept.keys() if wanted.get(name) != kept.get(name))
            problems.append(
                Problem(each.name, f"operator {each.operator} keeps no matching placeholder for {', '.join(differing)}")
            )
        # the loader initialises what it takes for missing; an operator's weights are never its business
        for inner in operator.modules():
            inner._is_hf_initialized = True
        operators[each.name], planned[each.name] = operator, each
        owners |= {f"{each.name}.{local}": (each.name, local) for local in wanted}
    if problems:
        raise PlanError("the plan cannot be carried out on this model", problems)
    return Grafts(operators, planned, owners)


def inject(model: nn.Module, grafts: Grafts) -> None:
    """Swaps each operator in for its module."""
    for name, operator in grafts.operators.items():
        swap(model, name, operator)


def swap(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Puts `replacement` where the submodule `name` was, in its parent's training mode."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    replacement.train(parent.training)
    if isinstance(parent, nn.ModuleList | nn.Sequential):
        parent[int(child)] = replacement
    else:
        setattr(parent, child, replacement)
