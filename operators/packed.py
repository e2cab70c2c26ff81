"""What `linear` and `experts` have in common: weights packed in node memory, placeholders before, nothing to copy after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from numagraft.contract import Accepted, Footprint, Operator, Rejected
from numagraft.errors import ConfigurationError, Problem, UnsupportedOperationError, WeightError
from numagraft.operators import custom_ops
from numagraft.operators.native_bridge import DTYPES
from numagraft.operators.params import PackedParams
from numagraft.operators.parents import computes_with
from numagraft.operators.placeholders import AbsentWeight, placeholder

if TYPE_CHECKING:
    from numagraft.native import OperatorStats, PlacedBuffer, Runtime
    from numagraft.placement import Part, Placement


#: formats that keep a checkpoint's own bytes
_OWN: dict[str | None, str] = {"e4m3": "fp8", "e2m1": "mxfp4"}


def _is_bias(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(each is parameter and name.endswith("bias") for name, each in module._parameters.items())


class PackedOperator(Operator):
    """An operator whose weights lie packed in native memory. Subclasses make `_weights` and feed it."""

    Params = PackedParams
    devices = ("cpu",)

    def __init__(
        self, module: nn.Module, params: PackedParams, *, name: str, placement: Placement, runtime: Runtime, device: str
    ) -> None:
        super().__init__()
        verdict = self.check_device(device, None)
        if isinstance(verdict, Rejected):
            raise ConfigurationError(f"{name}: the {type(self).__name__.lower()} operator: {verdict.reason}")
        self.name = name
        self.params = params
        self.placement = placement
        self.training = module.training
        # families read plain attributes of a child from outside: `experts.num_experts`
        for key, value in vars(module).items():
            if key not in self.__dict__ and (key == "config" or isinstance(value, (bool, int, float, str))):
                setattr(self, key, value)
        self._runtime = runtime
        self._weights: Any = None  # made when the first tensor arrives: it allocates
        self._tensors = {key: (p.shape, p.dtype) for key, p in module.named_parameters() if p is not None}
        for key, parameter in module._parameters.items():
            self.register_parameter(key, None if parameter is None else placeholder(parameter))
        self._handle = custom_ops.register(self)

    @classmethod
    def settled(cls, module: nn.Module, params: PackedParams) -> PackedParams:
        """`format: auto` is how the checkpoint stores the weights where that is fp8 or mxfp4, else int8."""
        if params.format != "auto":
            return params
        weights = [parameter for parameter in module._parameters.values() if parameter is not None and parameter.dim() > 1]
        codings = {getattr(weight, "numagraft_coding", None) for weight in weights if not _is_bias(module, weight)}
        return replace(params, format=_OWN.get(codings.pop(), "int8") if len(codings) == 1 else "int8")

    @classmethod
    def check_within(cls, parent: nn.Module, attribute: str) -> Accepted | Rejected:
        where = computes_with(parent, attribute)
        if where is None:
            return Accepted()
        return Rejected(f"{where} computes with {attribute}'s weight itself instead of calling it")

    def _new_weights(self) -> Any:
        raise NotImplementedError

    @property
    def weights(self) -> Any:
        """The native weights; made, and their memory placed, on first use."""
        if self._weights is None:
            self._weights = self._new_weights()
        return self._weights

    def finish(self) -> None:
        if missing := self.missing():
            problems = [Problem(f"{self.name}.{name}", "never arrived") for name in missing]
            raise WeightError(f"{self.name} lacks weights", problems)
        for key, (shape, dtype) in self._tensors.items():
            if self._parameters.pop(key, None) is not None:
                setattr(self, key, AbsentWeight(f"{self.name}.{key}", shape, dtype, torch.device("cpu")))

    def buffers_placed(self) -> Iterable[PlacedBuffer]:
        return () if self._weights is None else self._weights.buffers()

    def stats(self) -> OperatorStats | None:
        return None if self._weights is None else self._weights.stats()

    def grafted_numel(self) -> int:
        return 0 if self._weights is None else sum(shape.numel() for shape, _ in self._tensors.values())

    def grafted_bytes(self) -> int:
        return 0 if self._weights is None else self._weights.packed_bytes

    def extra_repr(self) -> str:
        text = f"{self.params.label()}, {self.placement.policy}"
        return text if self._weights is None else f"{text}, isa={self._weights.isa}"

    def refuse_grad(self, x: torch.Tensor) -> NoReturn:
        raise UnsupportedOperationError(
            f"{self.name}: packed weights have no gradients, and this input of shape {list(x.shape)} requires one; "
            f"call the model under torch.no_grad() or torch.inference_mode()"
        )

    def refuse_dtype(self, x: torch.Tensor) -> NoReturn:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedOperationError(
            f"{self.name}: found an input of dtype {str(x.dtype).removeprefix('torch.')}, expected one of {names}"
        )

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise UnsupportedOperationError(f"{self.name}: weights packed in node memory cannot be copied; load the model again")

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise UnsupportedOperationError(f"{self.name}: weights packed in node memory cannot be pickled")


def plain_module(module: nn.Module) -> Rejected | None:
    """Why a replacement would lose something that was put on this module from outside."""
    if "forward" in vars(module):
        return Rejected("its forward was replaced on the instance")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return Rejected("it carries hooks, which a replacement would drop")
    return None


def check_parameters(module: nn.Module, expected: Mapping[str, int]) -> Rejected | None:
    """`expected`: parameter name -> number of dimensions; all of floating dtypes the packer reads, and no others."""
    found = {key: value for key, value in module._parameters.items() if value is not None}
    if missing := sorted(set(expected) - set(found)):
        return Rejected(f"it has no parameter {', '.join(missing)}")
    if extra := sorted({*found, *(key for key, value in module._buffers.items() if value is not None)} - set(expected)):
        return Rejected(f"it also holds {', '.join(extra)}")
    for key, dimensions in expected.items():
        parameter = found[key]
        if isinstance(parameter, nn.UninitializedParameter):
            return Rejected(f"its {key} has no shape yet")
        if parameter.dtype not in DTYPES:
            return Rejected(f"its {key} is {str(parameter.dtype).removeprefix('torch.')}, not a floating dtype that packs")
        if parameter.dim() != dimensions or 0 in parameter.shape:
            return Rejected(f"its {key} has the shape {list(parameter.shape)}")
    return None


def packed_footprint(parts: Sequence[Part], part_bytes: Sequence[int], *, read_fraction: float = 1.0) -> Footprint:
    """Bytes per node of parts that take `part_bytes` each (a part on several nodes is spread over them), and the bytes one
    token reads: each stretch of units once, however many replicas it has, times `read_fraction`."""
    nodes: dict[int, int] = {}
    read: dict[tuple[int, int], int] = {}
    for part, size in zip(parts, part_bytes, strict=True):
        share = -(-size // len(part.memory_nodes))
        for node in part.memory_nodes:
            nodes[node] = nodes.get(node, 0) + share
        read[part.begin, part.end] = size
    return Footprint(node_bytes=nodes, bytes_per_token=int(sum(read.values()) * read_fraction))
