"""What modules hold, and a plan's totals: computed once when a plan is made and again when a saved one is checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from numagraft.rulefile.rules import DEFAULT

if TYPE_CHECKING:
    from numagraft.planning import KeptModule, PlannedModule

CPU = "cpu"


@dataclass(frozen=True)
class Totals:
    """Bytes by runtime node, by torch device other than the CPU, in ordinary tensors on the CPU; read per token."""

    node_bytes: Mapping[int, int]
    device_bytes: Mapping[str, int]
    kept_bytes: int
    bytes_per_token: int


def own_bytes(module: nn.Module, seen: set[int], dtype: torch.dtype | None = None) -> int:
    """Bytes of a module's own parameters (floating ones in `dtype`, where given) and buffers; those `seen` count no more."""
    amount = 0
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        cast = dtype is not None and tensor.is_floating_point() and isinstance(tensor, nn.Parameter)
        amount += tensor.numel() * (dtype.itemsize if cast and dtype is not None else tensor.element_size())
    return amount


def totals(modules: Iterable[PlannedModule], kept: Iterable[KeptModule], nodes: int) -> Totals:
    """Of a plan on `nodes` runtime nodes. What is kept and moved is counted where it is kept, not twice."""
    node_bytes = dict.fromkeys(range(nodes), 0)
    device_bytes: dict[str, int] = {}
    for each in kept:
        device_bytes[each.device] = device_bytes.get(each.device, 0) + each.bytes
    per_token = 0
    for module in modules:
        per_token += module.bytes_per_token
        for node, amount in module.node_bytes.items():
            node_bytes[node] = node_bytes.get(node, 0) + amount
        if module.operator == DEFAULT:
            continue
        for device, amount in module.device_bytes.items():
            device_bytes[device] = device_bytes.get(device, 0) + amount
    return Totals(node_bytes, device_bytes, device_bytes.pop(CPU, 0), per_token)


def device_of(name: str, devices: Mapping[str, str]) -> str:
    """The device of the nearest planned module around `name`, itself included; the CPU without one."""
    return devices.get(nearest(name, devices), CPU)


def nearest(name: str, planned: Mapping[str, object]) -> str:
    """`name` or the nearest module above it that is in `planned`, "" without one."""
    while name and name not in planned:
        name = name.rpartition(".")[0]
    return name


def moved_bytes(name: str, kept: Iterable[KeptModule], devices: Mapping[str, str]) -> int:
    """Bytes that move along with the kept module `name`: those of what is kept inside it."""
    return sum(each.bytes for each in kept if nearest(each.name, devices) == name)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and stored buffer by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def dtype_of(model: nn.Module) -> str:
    """ "bfloat16": that of the first floating parameter, "" without any."""
    first = next((each for each in model.parameters() if each.is_floating_point()), None)
    return "" if first is None else str(first.dtype).removeprefix("torch.")
