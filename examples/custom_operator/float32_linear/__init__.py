"""`float32_linear`: a linear layer that keeps its weight and computes in float32, whatever the model's dtype.

For the small layers whose rounding decides something, such as the gate of a shared expert. It computes in torch, so it has
no placement; an operator that packs weights into node memory is numagraft.operators.linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from numagraft.contract import Accepted, Footprint, Operator, Rejected
from numagraft.errors import WeightError


class Float32Linear(Operator):
    """y = x W^T + b in float32; the output has the input's dtype, or is kept in float32."""

    devices = ("cpu",)

    @dataclass(frozen=True)
    class Params:
        """What a rule may give under `kwargs:`; names and types are checked before any weight is read."""

        keep_output: bool = False

    @classmethod
    def check(cls, module: nn.Module, params: Params, platform: Any) -> Accepted | Rejected:
        if type(module).forward is not nn.Linear.forward:
            return Rejected(f"{type(module).__name__} does not compute as nn.Linear does")
        return Accepted()

    @classmethod
    def units(cls, module: nn.Module, params: Params) -> None:
        return None

    @classmethod
    def footprint(cls, module: nn.Linear, params: Params, placement: None, device: str) -> Footprint:
        size = 4 * sum(parameter.numel() for parameter in module.parameters())
        return Footprint(device_bytes={device: size}, bytes_per_token=size)

    @classmethod
    def from_module(cls, module: nn.Linear, params: Params, *, name: str, **placed: Any) -> Float32Linear:
        return cls(module, params, name)

    def __init__(self, module: nn.Linear, params: Params, name: str) -> None:
        super().__init__()
        self.name, self.params = name, params
        self.kept: dict[str, torch.Tensor] = {}
        # the loader knows a weight by a Parameter of its name, shape and dtype; these live until `finish`
        for key, parameter in module.named_parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            self.register_parameter(key, nn.Parameter(empty, requires_grad=False))

    def load(self, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        if name not in self._parameters or expert is not None:
            raise WeightError(f"{self.name} has no tensor {name!r}; it has: {', '.join(self._parameters)}")
        expected = self._parameters[name].shape
        if tensor.shape != expected:
            raise WeightError(f"{self.name}.{name}: found shape {list(tensor.shape)}, expected {list(expected)}")
        if name in self.kept:
            raise WeightError(f"{self.name}.{name} came twice")
        self.kept[name] = tensor.detach().to("cpu", torch.float32, copy=True)

    def missing(self) -> list[str]:
        return [name for name in self._parameters if name not in self.kept]

    def finish(self) -> None:
        self._parameters.clear()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = nn.functional.linear(input.float(), self.kept["weight"], self.kept.get("bias"))
        return output if self.params.keep_output else output.to(input.dtype)

    def grafted_numel(self) -> int:
        return sum(tensor.numel() for tensor in self.kept.values())

    def grafted_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())
