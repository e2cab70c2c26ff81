"""Weights, inputs and dequantised references for the operator benchmarks: numpy arrays and views of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.bf16 import from_bf16, normal

if TYPE_CHECKING:
    from numagraft.native import Matrix

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "f16": np.dtype(np.float16)}


def view(array: np.ndarray, *, dtype: str) -> Matrix:
    """A 2-D array as the native façade takes it; whoever calls keeps the array alive."""
    from numagraft.native import Matrix

    if array.ndim != 2 or array.dtype != DTYPES[dtype]:
        raise ValueError(f"expected a matrix of {dtype}, got {array.dtype} with shape {array.shape}")
    rows, columns = (stride // array.itemsize for stride in array.strides)
    return Matrix(array.ctypes.data, dtype, *array.shape, rows, columns)


class WeightSource:
    """Gaussian bf16 matrices of any shape up to `largest` weights, cut from one block at ever different offsets."""

    def __init__(self, largest: int, *, seed: int = 0, std: float = 0.02) -> None:
        self._spare = 1 << 20
        self._block = normal(largest + self._spare, std=std, seed=seed)
        self._offset = 0

    def matrix(self, rows: int, columns: int) -> np.ndarray:
        self._offset = (self._offset + 64 * 1013) % self._spare
        return self._block[self._offset : self._offset + rows * columns].reshape(rows, columns)


def inputs(tokens: int, width: int, *, count: int, seed: int = 7) -> Iterator[np.ndarray]:
    """Gaussian bf16 activations [tokens, width], `count` different ones in turn."""
    made = [normal(tokens * width, std=1.0, seed=seed + i).reshape(tokens, width) for i in range(count)]
    while True:
        yield from made


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def experts_in_fp32(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: dict, up: dict, down: dict
) -> np.ndarray:
    """The experts' output in fp32: sum over the chosen of weight * down(silu(gate x) * (up x)).

    `x` [tokens, hidden]; `gate`, `up`, `down` map an expert to its fp32 matrix.
    """
    out = np.zeros_like(x)
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        inner = silu(x[token] @ gate[expert].T) * (x[token] @ up[expert].T)
        np.add.at(out, token, (inner @ down[expert].T) * weights[token, slot, None])
    return out


__all__ = ["WeightSource", "experts_in_fp32", "from_bf16", "inputs", "relative_error", "silu", "view"]
