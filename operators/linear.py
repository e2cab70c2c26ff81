"""`linear`: nn.Linear with its weight packed in node memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler import is_compiling

from numagraft import native
from numagraft.contract import Accepted, Footprint, Operator, Rejected, StoredMatrix, Units
from numagraft.errors import UnsupportedOperationError, WeightError
from numagraft.operators import custom_ops  # noqa: F401  (defines torch.ops.numagraft.linear)
from numagraft.operators.native_bridge import DTYPES, check_weight, file_matrix, matrix, row
from numagraft.operators.packed import PackedOperator, check_parameters, packed_footprint, plain_module
from numagraft.operators.params import PackedParams
from numagraft.placement import Part

if TYPE_CHECKING:
    from numagraft.native import Runtime
    from numagraft.placement import Placement
    from numagraft.platform import Platform

#: output features in one panel of the packed layout
PANEL = 32


class Linear(PackedOperator):
    """y = x W^T + b for inputs [..., in_features] in float32, bfloat16 or float16; the output has the input's dtype."""

    @classmethod
    def check(cls, module: nn.Module, params: PackedParams, platform: Platform | None) -> Accepted | Rejected:
        """Only what computes exactly as nn.Linear does: routers and others that bring their own forward do not."""
        if not isinstance(module, nn.Linear):
            return Rejected(f"{type(module).__name__} is not an nn.Linear")
        if type(module).forward is not nn.Linear.forward:
            return Rejected(f"{type(module).__name__} is an nn.Linear with a forward of its own")
        expected = {"weight": 2} if module._parameters.get("bias") is None else {"weight": 2, "bias": 1}
        return params.conflict() or plain_module(module) or check_parameters(module, expected) or Accepted()

    @classmethod
    def units(cls, module: nn.Module, params: PackedParams) -> Units:
        """Output features; shards begin at whole panels."""
        everything = (Part((0,), False, (0,), 0, module.out_features),)
        return Units(module.out_features, PANEL, sum(_part_bytes(module, params, everything)))

    @classmethod
    def footprint(cls, module: nn.Module, params: PackedParams, placement: Placement, device: str) -> Footprint:
        return packed_footprint(placement.parts, _part_bytes(module, params, placement.parts))

    @classmethod
    def from_module(
        cls, module: nn.Module, params: Any, *, name: str, placement: Placement, runtime: Runtime, device: str
    ) -> Operator:
        return cls(module, params, name=name, placement=placement, runtime=runtime, device=device)

    def __init__(self, module: nn.Linear, params: PackedParams, **placed: Any) -> None:
        super().__init__(module, params, **placed)
        self.in_features = module.in_features
        self.out_features = module.out_features
        self._loaded: set[str] = set()

    def _new_weights(self) -> native.LinearWeights:
        return native.LinearWeights(
            self._runtime,
            out_features=self.out_features,
            in_features=self.in_features,
            format=self.params.weight_format(),
            parts=self.placement.parts,
            has_bias="bias" in self._tensors,
            owner=self.name,
        )

    def load(self, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        if name not in self._tensors:
            raise WeightError(f"{self.name} has no tensor named {name!r}; it has: {', '.join(self._tensors)}")
        if expert is not None:
            raise WeightError(f"{self.name}.{name}: a linear layer has no experts, found expert={expert}")
        tensor = check_weight(f"{self.name}.{name}", tensor, self._tensors[name][0])
        if name in self._loaded:
            raise WeightError(f"{self.name}.{name} came twice")
        if name == "weight":
            self.weights.load_weight(matrix(tensor))
        else:
            self.weights.load_bias(row(tensor))
        self._loaded.add(name)

    def load_stored(
        self, name: str, matrices: Sequence[Sequence[StoredMatrix]], *, first_expert: int | None = None
    ) -> bool:
        if name != "weight" or first_expert is not None or len(matrices) != 1 or len(matrices[0]) != 1:
            return False
        stored = matrices[0][0]
        shape = list(self._tensors["weight"][0])
        if [stored.rows, stored.columns] != shape:
            raise WeightError(f"{self.name}.weight: found shape {[stored.rows, stored.columns]}, expected {shape}")
        if name in self._loaded:
            raise WeightError(f"{self.name}.{name} came twice")
        self.weights.load_weight(file_matrix(stored))
        self._loaded.add(name)
        return True

    def missing(self) -> list[str]:
        return [name for name in self._tensors if name not in self._loaded]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.requires_grad and torch.is_grad_enabled():
            self.refuse_grad(input)
        if type(input) is torch.Tensor and input.is_cpu and not is_compiling():
            return self.compute(input)
        if input.device.type in ("cpu", "meta"):
            return torch.ops.numagraft.linear(input, self._handle, self.out_features)
        return self.forward(input.to("cpu")).to(input.device)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` for a plain CPU tensor, without the checks of the caller's mode."""
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise UnsupportedOperationError(
                f"{self.name}: found an input of shape {list(shape)}, expected [..., {self.in_features}]"
            )
        if x.dtype not in DTYPES:
            self.refuse_dtype(x)
        out = x.new_empty((*shape[:-1], self.out_features))
        if not out.numel():
            return out
        if x.is_contiguous():
            self.weights.forward_rows(x.data_ptr(), DTYPES[x.dtype], x.numel() // self.in_features, out.data_ptr())
        else:
            rows = x.reshape(-1, shape[-1])  # named, because it may copy: the tensor must outlive the call
            self.weights.forward(matrix(rows), matrix(out.view(-1, self.out_features)))
        return out

    def extra_repr(self) -> str:
        bias = "bias" in self._tensors
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {super().extra_repr()}"


def _part_bytes(module: nn.Linear, params: PackedParams, parts: tuple[Part, ...]) -> list[int]:
    has_bias = module._parameters.get("bias") is not None
    return native.linear_packed_bytes(
        module.out_features, module.in_features, params.weight_format(), has_bias, parts
    )
