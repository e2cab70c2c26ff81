"""Arrays for the native weights, and the same computations in fp32 numpy."""

from __future__ import annotations

from collections import deque

import numpy as np

from numagraft.native import Gate, Matrix, Runtime, WeightFormat, capabilities
from numagraft.placement import Part
from numagraft.runtime import RuntimeLayout

#: relative Frobenius error against fp32 with the same dequantised weights (docs/kernels.md says where they come from)
LINEAR_BAR = {"bf16": 4e-3, "fp8": 4e-3, "int8": 1.2e-2, "int4": 1.2e-2, "mxfp4": 1.2e-2}
EXPERTS_BAR = {"bf16": 4e-3, "fp8": 8e-3, "int8": 2e-2, "int4": 2e-2, "mxfp4": 2e-2}

FORMATS = [
    WeightFormat("bf16"),
    WeightFormat("int8"),
    WeightFormat("int4"),
    WeightFormat("int4", symmetric=True),
    WeightFormat("int4", group=64),
    WeightFormat("int4", group=128),
    WeightFormat("int4", group=128, symmetric=True),
    WeightFormat("fp8"),
    WeightFormat("mxfp4"),
]
ISAS = capabilities().supported
#: the same with either order of reading weights: one is what this CPU's memory likes, and so the plain row's
ORDERED_ISAS = (*ISAS, *(f"{isa}:{order}" for isa in ISAS if isa.startswith("avx") for order in ("in-turn", "in-order")))


def name_of(format: WeightFormat) -> str:
    return f"{format.kind}-g{format.group}{'-symmetric' if format.symmetric else ''}" if format.kind == "int4" else format.kind


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bits, rounded to nearest even; finite values."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


_alive: deque[np.ndarray] = deque(maxlen=64)


def matrix(array: np.ndarray, dtype: str | None = None) -> Matrix:
    """A 2-D array; fp32, fp16 and int64 by their dtype, bf16 as uint16. The last few arrays are kept alive."""
    _alive.append(array)
    names = {"float32": "f32", "uint16": "bf16", "float16": "f16", "int64": "i64"}
    rows, columns = array.shape
    row_stride, column_stride = (stride // array.itemsize for stride in array.strides)
    return Matrix(array.ctypes.data, dtype or names[array.dtype.name], rows, columns, row_stride, column_stride)


def runtime(nodes: int = 1, threads: int = 1) -> Runtime:
    return Runtime(RuntimeLayout.virtual(nodes, threads_per_node=threads))


def parts(policy: str, nodes: int, units: int, multiple: int = 1) -> tuple[Part, ...]:
    everyone = tuple(range(nodes))
    if policy == "shard":
        steps = -(-units // multiple)
        edges = [min(steps * i // nodes * multiple, units) for i in range(nodes + 1)]
        return tuple(Part((i,), False, (i,), edges[i], edges[i + 1]) for i in everyone)
    if policy == "mirror":
        return tuple(Part((i,), False, (i,), 0, units) for i in everyone)
    return (Part(everyone, policy == "interleave", everyone, 0, units),)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def describe_worst(found: np.ndarray, expected: np.ndarray) -> str:
    """For assertion messages: where the two are furthest apart."""
    at = np.unravel_index(np.argmax(np.abs(found - expected)), found.shape)
    return f"worst at {tuple(int(i) for i in at)}: found {found[at]}, expected {expected[at]}"


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def apply_gate(gate: Gate, g: np.ndarray, u: np.ndarray) -> np.ndarray:
    from math import erf

    if gate.kind == "clamped_swiglu":
        g, u = np.minimum(g, gate.limit), np.clip(u, -gate.limit, gate.limit)
        return g * sigmoid(gate.alpha * g) * (u + 1)
    if gate.kind == "silu":
        return g * sigmoid(g) * u
    if gate.kind == "relu":
        return np.maximum(g, 0) * u
    if gate.kind == "gelu":
        return 0.5 * g * (1 + np.vectorize(erf)(g / np.sqrt(2))) * u
    return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
