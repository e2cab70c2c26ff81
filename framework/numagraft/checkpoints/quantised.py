"""Checkpoints that come quantised: fp8 with block scales (DeepSeek-V3's layout) and mxfp4 (gpt-oss's).

A weight and its scales become one tensor under the model's own name. Its dtype is the model's, which is what `read` gives;
operators take its codes and scales as they are, by `stored`.

- fp8: `NAME` in float8_e4m3fn and `NAME_scale_inv`, which the codes are multiplied by, one per block of 128 x 128.
  Source of the layout: github.com/deepseek-ai/DeepSeek-V3, inference/fp8_cast_bf16.py.
- mxfp4: `NAME_blocks` [experts, rows, groups, 16] bytes of two e2m1 codes, the first in the low half, and `NAME_scales`
  [experts, rows, groups], powers of two with a bias of 127. Rows are output channels; the model's parameter is transposed.
  Source: the OCP Microscaling Formats specification 1.0, and gpt-oss's published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from numagraft.checkpoints.mapping import LazyTensor
from numagraft.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from numagraft.contract import StoredMatrix

METHODS = ("fp8", "mxfp4")
BLOCK = 128
GROUP = 32
_SHOWN = 8
_FP8_SCALES = (torch.float32, torch.bfloat16, torch.float16)
#: what the 16 codes of e2m1 stand for
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def quantisation_of(config: Any) -> Mapping[str, Any] | None:
    """`quantization_config` of a configuration, or of its text part, as plain data; None without one."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found is None:
        return None
    data = dict(found) if isinstance(found, Mapping) else found.to_dict()
    method = data.get("quant_method")
    return data | {"quant_method": getattr(method, "value", method)}


def without_quantisation(config: Any) -> None:
    """Takes the entry away: weights are handed to transformers as those of an ordinary model."""
    for each in (config, config.get_text_config(decoder=True)):
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config


class QuantisedTensor(LazyTensor):
    """Codes and scales that are one weight; `coding` is how `StoredMatrix` calls it."""

    coding: str

    def __init__(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], codes: LazyTensor, scales: LazyTensor
    ) -> None:
        super().__init__(name, dtype, shape)
        self._codes, self._scales = codes, scales

    @property
    def source_bytes(self) -> int:
        return self._codes.source_bytes + self._scales.source_bytes

    def prefetch(self, index: int | None = None) -> int:
        return self._codes.prefetch(index) + self._scales.prefetch(index)

    def was_read(self, index: int | None = None) -> None:
        self._codes.was_read(index)


class Fp8Tensor(QuantisedTensor):
    """A matrix, or one per expert, in e4m3 with a scale per block of 128 x 128."""

    coding = "e4m3"

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._finish(_fp8_values(self._codes.read(), self._scales.read()), out)

    def read_part(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._finish(_fp8_values(self._codes.read_part(index), self._scales.read_part(index)), out)

    def _finish(self, values: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return values.to(self.dtype) if out is None else out.copy_(values)

    def stored(self, index: int | None = None) -> StoredMatrix | None:
        codes = self._codes.stored(index)
        if codes is None:
            return None
        scales = self._scales.read() if index is None else self._scales.read_part(index)
        return replace(codes, scales=scales.float().contiguous())


def _fp8_values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape[-2:]
    wide = scales.float().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return codes.float() * wide


class Mxfp4Tensor(QuantisedTensor):
    """One matrix per expert in e2m1 with a power of two per 32 inputs, under the name of a transposed parameter."""

    coding = "e2m1"

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        values = torch.empty(self.shape, dtype=self.dtype) if out is None else out
        for index in range(self.shape[0]):
            self.read_part(index, values[index])
        return values

    def read_part(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        blocks, exponents = self._codes.read_part(index), self._scales.read_part(index)
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # [rows, groups, 32]
        values = torch.tensor(E2M1)[codes.int()] * torch.exp2(exponents.double() - 127).float().unsqueeze(-1)
        values = values.flatten(-2).T
        return values.to(self.dtype).contiguous() if out is None else out.copy_(values)

    def stored(self, index: int | None = None) -> StoredMatrix | None:
        if index is None:
            return None
        codes = self._codes.stored(index)
        return None if codes is None else replace(codes, scales=self._scales.read_part(index))


def join(
    source: str, tensors: Mapping[str, LazyTensor], quantisation: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint with codes and scales made one, in the same order.

    Raises CheckpointError naming every weight without its scales, every scale without its weight, and other layouts.
    """
    method = quantisation["quant_method"]
    problems = _layout_problems(quantisation)
    if problems:
        raise CheckpointError(
            f"{source} is quantised ({method}) in a layout that is not supported: give another one, or the bf16 checkpoint",
            problems,
        )
    joined: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if method == "fp8" and tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
            scale = f"{name}_scale_inv"
            problem = _fp8_problem(name, tensor, tensors.get(scale))
            if problem is None:
                joined[name] = Fp8Tensor(name, dtype, tuple(tensor.shape), tensor, tensors[scale])
            used.add(scale)
        elif method == "mxfp4" and name.endswith("_blocks"):
            base, scale = name.removesuffix("_blocks"), name.removesuffix("_blocks") + "_scales"
            problem = _mxfp4_problem(name, tensor, tensors.get(scale))
            if problem is None:
                experts, rows, groups, _ = tensor.shape
                joined[base] = Mxfp4Tensor(base, dtype, (experts, groups * GROUP, rows), tensor, tensors[scale])
            used.add(scale)
        else:
            joined[name] = tensor
            continue
        if problem is not None:
            problems.append(problem)
    suffix = "_scale_inv" if method == "fp8" else "_scales"
    for name in list(joined):
        if name in used:
            del joined[name]
        elif name.endswith(suffix):
            problems.append(Problem(name, "belongs to no quantised weight of this checkpoint"))
    if problems:
        more = [Problem("", f"and {len(problems) - _SHOWN} more")] if len(problems) > _SHOWN else []
        raise CheckpointError(
            f"{source}: {len(problems)} tensors are not what a {method} checkpoint holds; download it again, or give "
            "the bf16 checkpoint of this model",
            [*problems[:_SHOWN], *more],
        )
    return joined


def _layout_problems(quantisation: Mapping[str, Any]) -> list[Problem]:
    where = "quantization_config"
    method = quantisation["quant_method"]
    found: list[Problem] = []
    if method == "fp8":
        block = quantisation.get("weight_block_size", (BLOCK, BLOCK))
        if block is None or list(block) != [BLOCK, BLOCK]:
            given = "one scale per tensor" if block is None else f"blocks of {list(block)}"
            found.append(Problem(f"{where}.weight_block_size", f"found {given}, expected [{BLOCK}, {BLOCK}]"))
        for key, expected in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
            value = quantisation.get(key)
            if value not in (None, expected):
                found.append(Problem(f"{where}.{key}", f"found {value!r}, expected {expected!r}"))
    return found


def _fp8_problem(name: str, codes: LazyTensor, scales: LazyTensor | None) -> Problem | None:
    if codes.dtype != torch.float8_e4m3fn:
        return Problem(name, f"holds {codes.get_dtype()} values, expected F8_E4M3")
    if len(codes.shape) not in (2, 3):
        return Problem(name, f"has the shape {list(codes.shape)}, expected a matrix, or one per expert")
    if scales is None:
        return Problem(name, f"has no {name}_scale_inv beside it")
    expected = [*codes.shape[:-2], *(-(-size // BLOCK) for size in codes.shape[-2:])]
    if list(scales.shape) != expected or scales.dtype not in _FP8_SCALES:
        return Problem(
            scales.name,
            f"has the shape {list(scales.shape)} in {scales.get_dtype()}, expected {expected} in F32: one scale per block of "
            f"{BLOCK} x {BLOCK} of {list(codes.shape)}",
        )
    return None


def _mxfp4_problem(name: str, blocks: LazyTensor, scales: LazyTensor | None) -> Problem | None:
    if blocks.dtype != torch.uint8 or len(blocks.shape) != 4 or blocks.shape[-1] != GROUP // 2:
        return Problem(
            name, f"has the shape {list(blocks.shape)} in {blocks.get_dtype()}, expected [experts, rows, groups, 16] in U8"
        )
    if scales is None:
        return Problem(name, f"has no {name.removesuffix('_blocks')}_scales beside it")
    if scales.shape != blocks.shape[:-1] or scales.dtype != torch.uint8:
        return Problem(
            scales.name,
            f"has the shape {list(scales.shape)} in {scales.get_dtype()}, expected {list(blocks.shape[:-1])} in U8",
        )
    return None
