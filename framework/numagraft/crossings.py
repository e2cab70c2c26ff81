"""Crossings between devices: a module on another device than its surroundings gets its inputs moved there and back.

Here for modules that are kept (`class: default` with a device); operators cross by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from numagraft.planning import Plan

MAIN_DEVICE = "cpu"
KEEP = "default"  # the rule language's name for keeping a module


def devices_by_module(plan: Plan) -> dict[str, torch.device]:
    """The device of every planned module; everything else lives where its nearest planned ancestor does, or on the CPU."""
    return {each.name: torch.device(each.device or MAIN_DEVICE) for each in plan.modules}


def device_of(name: str, devices: dict[str, torch.device]) -> torch.device:
    """Where the module or parameter `name` lives: the device of its nearest planned ancestor, itself included."""
    while name:
        if name in devices:
            return devices[name]
        name = name.rpartition(".")[0]
    return torch.device(MAIN_DEVICE)


def add_crossings(model: nn.Module, plan: Plan) -> list[str]:
    """Adds hooks where a kept module's device differs from what surrounds it; returns those modules' names."""
    devices = devices_by_module(plan)
    crossed = []
    for each in plan.modules:
        if each.operator != KEEP:
            continue
        name, device = each.name, devices[each.name]
        home = device_of(name.rpartition(".")[0], devices)
        if device != home:
            add_crossing(model.get_submodule(name), device, home)
            crossed.append(name)
    return crossed


def add_crossing(module: nn.Module, device: torch.device, home: torch.device) -> None:
    """Inputs of `module` are moved to `device` before it runs, its outputs to `home` after."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return move(args, device), move(kwargs, device)

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return move(output, home)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def move(values: Any, device: torch.device) -> Any:
    """Every tensor in nested tuples, lists, dicts and model outputs on `device`; caches and other objects stay."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)
