"""Operators that plan as the packed ones do, without the native backend: for tests of rules and plans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from numagraft.contract import Accepted, Footprint, Operator, Rejected, Units
from numagraft.placement import PlacementSpec, placed_bytes
from numagraft.roles import count_experts

AUTO = PlacementSpec()
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Packing:
    format: Literal["auto", "bf16", "int8", "int4"] = "auto"
    group: Literal[32, 64, 128] = 32
    scale: float = 1.0
    symmetric: bool = False
    placement: PlacementSpec = AUTO


class LinearStandIn(Operator):
    Params = Packing
    devices = ("cpu",)

    @classmethod
    def check(cls, module: nn.Module, params: Any, platform: Any) -> Accepted | Rejected:
        if not isinstance(module, nn.Linear):
            return Rejected(f"{type(module).__name__} is not an nn.Linear")
        if type(module).forward is not nn.Linear.forward:
            return Rejected(f"{type(module).__name__} is an nn.Linear with a forward of its own")
        return Accepted()

    @classmethod
    def settled(cls, module: nn.Module, params: Any) -> Any:
        return replace(params, format="int8") if params.format == "auto" else params

    @classmethod
    def units(cls, module: nn.Module, params: Any) -> Units:
        numel = sum(parameter.numel() for parameter in module.parameters())
        return Units(next(module.parameters()).shape[-2], 32, int(numel * BYTES[params.format]))

    @classmethod
    def footprint(cls, module: nn.Module, params: Any, placement: Any, device: str) -> Footprint:
        packed = cls.units(module, params).packed_bytes
        return Footprint(node_bytes=placed_bytes(placement, packed), bytes_per_token=packed)


class ExpertsStandIn(LinearStandIn):
    @classmethod
    def footprint(cls, module: nn.Module, params: Any, placement: Any, device: str) -> Footprint:
        down = getattr(module, "down_proj", None)  # families that the contract does not cover have none
        hidden = 0 if down is None else down.shape[1]
        return replace(super().footprint(module, params, placement, device), added_per_token=hidden)

    @classmethod
    def check(cls, module: nn.Module, params: Any, platform: Any) -> Accepted | Rejected:
        if count_experts(module) is None:
            return Rejected(f"{type(module).__name__} holds no experts")
        return Accepted()
