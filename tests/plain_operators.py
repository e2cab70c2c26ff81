"""Operators in plain torch that keep every weight as it is: they show that the machinery loses and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from numagraft.contract import Accepted, Footprint, Operator
from numagraft.errors import WeightError
from numagraft.planning import Plan, PlannedModule
from numagraft.rulefile.rules import Location
from numagraft.runtime import RuntimeLayout


@dataclass(frozen=True)
class NoParams:
    pass


class Plain(Operator):
    """Keeps copies of its tensors outside Parameters, as packed operators do."""

    Params = NoParams

    @classmethod
    def check(cls, module: nn.Module, params: Any, platform: Any) -> Accepted:
        return Accepted()

    @classmethod
    def units(cls, module: nn.Module, params: Any) -> None:
        return None

    @classmethod
    def footprint(cls, module: nn.Module, params: Any, placement: Any, device: str) -> Footprint:
        return Footprint()

    @classmethod
    def from_module(cls, module: nn.Module, params: Any, *, name: str, **_: Any) -> Plain:
        operator = cls()
        operator.full_name = name
        operator.kept = {}
        operator.arrived = {}
        operator.prepare(module)
        for local, parameter in module.named_parameters():
            meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            operator.register_parameter(local, nn.Parameter(meta))
        return operator

    def prepare(self, module: nn.Module) -> None:
        pass

    def load(self, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        placeholder = self.get_parameter(name)
        shape = placeholder.shape if expert is None else placeholder.shape[1:]
        if tensor.shape != shape:
            raise WeightError(f"{self.full_name}.{name}: found {list(tensor.shape)}, expected {list(shape)}")
        arrived = self.arrived.setdefault(name, set())
        if expert in arrived:
            raise WeightError(f"{self.full_name}.{name} came twice")
        arrived.add(expert)
        tensor = tensor.to(placeholder.dtype)
        if expert is None:
            self.kept[name] = tensor.clone()
        else:
            if name not in self.kept:
                self.kept[name] = torch.empty(placeholder.shape, dtype=placeholder.dtype)
            self.kept[name][expert] = tensor

    def missing(self) -> list[str]:
        names = []
        for name, placeholder in self.named_parameters():
            arrived = self.arrived.get(name, set())
            if None not in arrived and len(arrived) != placeholder.shape[0]:
                names.append(name)
        return names

    def finish(self) -> None:
        self._parameters.clear()

    def grafted_numel(self) -> int:
        return sum(tensor.numel() for tensor in self.kept.values())

    def grafted_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())


class PlainLinear(Plain):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.kept["weight"], self.kept.get("bias"))


class PlainExperts(Plain):
    """Computes with the original module, whose parameters it fills in at the end."""

    def prepare(self, module: nn.Module) -> None:
        self.__dict__["original"] = module

    def finish(self) -> None:
        super().finish()
        for name, tensor in self.kept.items():
            self.__dict__["original"]._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.__dict__["original"](*args, **kwargs)


def plan_plain(model: nn.Module, *, lm_head: bool = True, device: str = "cpu") -> Plan:
    """A plan that replaces every linear layer and every fused experts module of `model` by a plain operator."""
    planned = []
    for name, module in model.named_modules():
        kind = {"Linear": "PlainLinear", "Qwen3MoeExperts": "PlainExperts"}.get(type(module).__name__)
        if kind is None or (name == "lm_head" and not lm_head):
            continue
        planned.append(
            PlannedModule(
                name=name,
                class_name=type(module).__name__,
                role="linear",
                rule_id="plain",
                location=Location("test.yaml", 1, 1),
                operator=f"tests.plain_operators.{kind}",
                device=device,
                params=NoParams(),
                placement=None,
                node_bytes={},
                device_bytes={},
                bytes_per_token=0,
            )
        )
    return Plan(
        model_class=type(model).__name__,
        source="test.yaml",
        layout=RuntimeLayout.virtual(1),
        modules=tuple(planned),
        kept_bytes=0,
    )
