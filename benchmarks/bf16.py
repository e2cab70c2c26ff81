"""bf16 in numpy, which has no such type: 16-bit patterns in uint16 arrays."""

from __future__ import annotations

import numpy as np


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bits, to nearest with ties to even; finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def normal(count: int, *, std: float, seed: int) -> np.ndarray:
    """`count` Gaussian weights as bf16 bits."""
    generator = np.random.default_rng(seed)
    return to_bf16(generator.standard_normal(count, dtype=np.float32) * np.float32(std))
