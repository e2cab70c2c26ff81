"""`experts`: the fused experts of a mixture, packed in node memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler import is_compiling

from numagraft import native
from numagraft.contract import Accepted, Footprint, Operator, Rejected, StoredMatrix, Units
from numagraft.errors import UnsupportedOperationError, WeightError
from numagraft.operators.expert_contract import ExpertShape, expert_shape
from numagraft.operators.native_bridge import DTYPES, check_weight, file_matrix, matrix, row
from numagraft.operators.packed import PackedOperator, packed_footprint
from numagraft.operators.params import PackedParams
from numagraft.placement import Part

if TYPE_CHECKING:
    from numagraft.native import Runtime
    from numagraft.placement import Placement
    from numagraft.platform import Platform

_INDEX_DTYPES = {torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8}

#: intermediate features that one step of the down projection takes: shards begin at multiples of it
STEP = 64
#: ... and those that one scale covers: a shard that begins or ends within such a block packs all of it
FP8_BLOCK = 128

# how many experts one token chooses, under the names that configurations give it
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k", "moe_k")

# fused parameter -> the pieces it is packed from; the pieces may also be loaded by their own names, per expert
_PIECES = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "gate_up_proj_bias": ("gate_proj_bias", "up_proj_bias"),
    "down_proj_bias": ("down_proj_bias",),
}


class Experts(PackedOperator):
    """`experts(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`.

    Each token's result is the weighted sum of its experts' down(gate(x) * up(x)). An index equal to the number of experts
    skips that slot; one beyond it raises IndexError naming the token.
    """

    @classmethod
    def check(cls, module: nn.Module, params: PackedParams, platform: Platform | None) -> Accepted | Rejected:
        shape = expert_shape(module)
        if isinstance(shape, Rejected):
            return shape
        return params.conflict() or Accepted(f"gate {shape.gate.kind}")

    @classmethod
    def units(cls, module: nn.Module, params: PackedParams) -> Units:
        """Intermediate features; shards begin where groups and packed steps do."""
        shape = _shape(module)
        everything = (Part((0,), False, (0,), 0, shape.intermediate),)
        scaled = {"int4": params.group, "fp8": FP8_BLOCK}.get(params.format, STEP)
        return Units(shape.intermediate, max(STEP, scaled), sum(_part_bytes(shape, params, everything)))

    @classmethod
    def footprint(cls, module: nn.Module, params: PackedParams, placement: Placement, device: str) -> Footprint:
        shape = _shape(module)
        config = getattr(module, "config", None)
        top_k = next((k for name in _TOP_K_NAMES if isinstance(k := getattr(config, name, None), int)), shape.experts)
        fraction = min(top_k / shape.experts, 1.0)
        part_bytes = _part_bytes(shape, params, placement.parts)
        found = packed_footprint(placement.parts, part_bytes, read_fraction=fraction)
        return replace(found, added_per_token=shape.hidden)

    @classmethod
    def from_module(
        cls, module: nn.Module, params: Any, *, name: str, placement: Placement, runtime: Runtime, device: str
    ) -> Operator:
        return cls(module, params, name=name, placement=placement, runtime=runtime, device=device)

    def __init__(self, module: nn.Module, params: PackedParams, **placed: Any) -> None:
        super().__init__(module, params, **placed)
        self.shape = _shape(module)
        self.num_experts = self.shape.experts
        self._loaded: set[tuple[str, int]] = set()  # (piece, expert)

    def _new_weights(self) -> native.ExpertsWeights:
        shape = self.shape
        return native.ExpertsWeights(
            self._runtime,
            experts=shape.experts,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            format=self.params.weight_format(),
            gate=native.Gate(kind=shape.gate.kind, alpha=shape.gate.alpha, limit=shape.gate.limit),
            parts=self.placement.parts,
            has_bias=shape.has_bias,
            owner=self.name,
        )

    def load(self, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        """`name` is a fused parameter ("gate_up_proj", whole or with `expert`), or with `expert` also one half of it:
        "gate_proj", "up_proj" and their biases, in the orientation of the fused parameter."""
        shapes = self._piece_shapes()
        pieces = _PIECES.get(name, (name,))
        if any(piece not in shapes for piece in pieces):
            known = [*self._tensors, *(piece for piece in shapes if piece not in self._tensors)]
            raise WeightError(f"{self.name} has no tensor named {name!r}; it has: {', '.join(known)}")
        where = f"{self.name}.{name}" if expert is None else f"{self.name}.{name}[{expert}]"
        if expert is not None and not 0 <= expert < self.shape.experts:
            raise WeightError(f"{where}: there is no expert {expert}; the module has {self.shape.experts}")
        if expert is None and name not in self._tensors:
            raise WeightError(f"{where}: half of a fused tensor comes expert by expert; say which expert it is")
        whole = tuple(self._tensors[name][0][1:]) if name in self._tensors else shapes[name]
        tensor = check_weight(where, tensor, whole if expert is not None else (self.shape.experts, *whole))
        experts = range(self.shape.experts) if expert is None else range(expert, expert + 1)
        self._refuse_twice(where, pieces, experts)
        self._pack(pieces, tensor if expert is None else tensor.unsqueeze(0), experts)
        self._loaded.update((piece, index) for piece in pieces for index in experts)

    def load_stored(
        self, name: str, matrices: Sequence[Sequence[StoredMatrix]], *, first_expert: int | None = None
    ) -> bool:
        """Any fused parameter or piece of one whose rows are output channels in the file."""
        pieces = _PIECES.get(name, (name,))
        shapes = self._piece_shapes()
        if first_expert is None or any(piece not in shapes or piece.endswith("_bias") for piece in pieces):
            return False
        apart = [self._pieces_of(parts, len(pieces)) for parts in matrices]
        expected = [shapes[piece][::-1] if self.shape.transposed else shapes[piece] for piece in pieces]
        for parts in apart:
            if parts is None or [(part.rows, part.columns) for part in parts] != expected:
                return False  # `load` says what is wrong
        experts = range(first_expert, first_expert + len(apart))
        if experts and not 0 <= experts[0] <= experts[-1] < self.shape.experts:
            raise WeightError(
                f"{self.name}.{name}: found experts {experts[0]} to {experts[-1]}; the module has {self.shape.experts}"
            )
        self._refuse_twice(f"{self.name}.{name}", pieces, experts)
        listed = {
            piece.removesuffix("_proj"): [file_matrix(parts[index]) for parts in apart]
            for index, piece in enumerate(pieces)
        }
        self.weights.load_experts(**listed, first_expert=first_expert)
        self._loaded.update((piece, index) for piece in pieces for index in experts)
        return True

    def _pieces_of(self, parts: Sequence[StoredMatrix], pieces: int) -> list[StoredMatrix] | None:
        """One matrix per piece, of parts that make up a parameter's rows; None where they do not divide so."""
        if len(parts) == pieces and (pieces == 1 or not self.shape.gate.interleaved):
            return list(parts)
        if len(parts) != 1 or pieces != 2:
            return None
        inner = self.shape.intermediate
        interleaved = self.shape.gate.interleaved
        halves = [parts[0].every(2, i, inner) if interleaved else parts[0].every(1, i * inner, inner) for i in (0, 1)]
        return None if parts[0].rows != 2 * inner or None in halves else halves

    def _refuse_twice(self, where: str, pieces: tuple[str, ...], experts: range) -> None:
        if came := [index for index in experts for piece in pieces if (piece, index) in self._loaded]:
            raise WeightError(f"{where} came twice: expert {came[0]} had been loaded before")

    def _pack(self, pieces: tuple[str, ...], tensor: torch.Tensor, experts: range) -> None:
        for piece, part in zip(pieces, self._split(tensor, len(pieces)), strict=True):
            if piece.endswith("_bias"):
                load = getattr(self.weights, "load_" + piece.replace("_proj", ""))
                for index, values in zip(experts, part, strict=True):
                    load(index, row(values))
        if not pieces[0].endswith("_bias"):
            matrices = {
                piece.removesuffix("_proj"): [matrix(weight.T if self.shape.transposed else weight) for weight in part]
                for piece, part in zip(pieces, self._split(tensor, len(pieces)), strict=True)
            }
            self.weights.load_experts(**matrices, first_expert=experts.start)

    def _split(self, tensor: torch.Tensor, pieces: int) -> tuple[torch.Tensor, ...]:
        """A fused tensor [n, ...] as views of its gate and its up; strides only, nothing is copied."""
        if pieces == 1:
            return (tensor,)
        dimension = 2 if self.shape.transposed and tensor.dim() == 3 else 1
        if self.shape.gate.interleaved:
            views = tensor.unflatten(dimension, (self.shape.intermediate, 2))
            return tuple(views.select(dimension + 1, half) for half in (0, 1))
        return tuple(tensor.split(self.shape.intermediate, dimension))

    def _piece_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = self.shape
        wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
        if shape.transposed:
            wide, tall = tall, wide
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": tall}
        if shape.has_bias:
            inner = (shape.intermediate,)
            shapes |= {"gate_proj_bias": inner, "up_proj_bias": inner, "down_proj_bias": (shape.hidden,)}
        return shapes

    def missing(self) -> list[str]:
        return [name for fused in self._tensors for name in self._missing_of(fused)]

    def _missing_of(self, fused: str) -> Iterator[str]:
        pieces = _PIECES[fused]
        absent = [
            (index, [piece for piece in pieces if (piece, index) not in self._loaded])
            for index in range(self.shape.experts)
        ]
        if all(len(lacking) == len(pieces) for _, lacking in absent):
            yield fused
            return
        for index, lacking in absent:
            if len(lacking) == len(pieces):
                yield f"{fused}[{index}]"
            else:
                yield from (f"{piece}[{index}]" for piece in lacking)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        *,
        router_indices: torch.Tensor | None = None,
        routing_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last two are gpt-oss's names for index and weights."""
        index = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if torch.is_grad_enabled() and (hidden_states.requires_grad or weights.requires_grad):
            self.refuse_grad(hidden_states if hidden_states.requires_grad else weights)
        device = hidden_states.device
        if device.type != "meta" and not (hidden_states.is_cpu and index.is_cpu and weights.is_cpu):
            return self.forward(hidden_states.to("cpu"), index.to("cpu"), weights.to("cpu")).to(device)
        plain = type(hidden_states) is type(index) is type(weights) is torch.Tensor
        if plain and device.type == "cpu" and not is_compiling():
            return self.compute(hidden_states, index, weights)
        return torch.ops.numagraft.experts(hidden_states, index, weights, self._handle)

    def compute(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`forward` for plain CPU tensors, without the checks of the caller's mode."""
        if x.shape[-1] != self.shape.hidden or index.shape != weights.shape or index.shape[:-1] != x.shape[:-1]:
            raise UnsupportedOperationError(
                f"{self.name}: found hidden_states {list(x.shape)}, top_k_index {list(index.shape)}, top_k_weights "
                f"{list(weights.shape)}; expected [T, {self.shape.hidden}], [T, k], [T, k]"
            )
        for tensor in (x, weights):
            if tensor.dtype not in DTYPES:
                self.refuse_dtype(tensor)
        if index.dtype not in _INDEX_DTYPES:
            raise UnsupportedOperationError(f"{self.name}: found a top_k_index of dtype {index.dtype}, expected integers")
        out = x.new_empty(x.shape)
        if out.numel():
            # named, because each may be a copy: the tensors must outlive the call
            rows = x if x.is_contiguous() else x.contiguous()
            chosen = index if index.dtype is torch.int64 else index.to(torch.int64)
            chosen = chosen if chosen.is_contiguous() else chosen.contiguous()
            shares = weights if weights.is_contiguous() else weights.contiguous()
            self.weights.forward_rows(
                *(rows.data_ptr(), DTYPES[x.dtype], x.numel() // self.shape.hidden),
                *(chosen.data_ptr(), index.shape[-1], shares.data_ptr(), DTYPES[weights.dtype], out.data_ptr()),
            )
        return out

    def extra_repr(self) -> str:
        shape = self.shape
        text = f"experts={shape.experts}, hidden={shape.hidden}, intermediate={shape.intermediate}, gate={shape.gate.kind}"
        return f"{text}, bias={shape.has_bias}, {super().extra_repr()}"


def _shape(module: nn.Module) -> ExpertShape:
    shape = expert_shape(module)
    if isinstance(shape, Rejected):
        raise UnsupportedOperationError(f"the experts operator cannot replace this module: {shape.reason}")
    return shape


def _part_bytes(shape: ExpertShape, params: PackedParams, parts: tuple[Part, ...]) -> list[int]:
    return native.experts_packed_bytes(
        shape.experts, shape.hidden, shape.intermediate, params.weight_format(), shape.has_bias, parts
    )
