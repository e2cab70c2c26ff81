"""A stand-in for the native weights, in torch and without quantisation; goes as soon as the real ones are there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64}


@dataclass(frozen=True)
class Matrix:
    address: int
    dtype: str
    rows: int
    columns: int
    row_stride: int
    column_stride: int = 1


@dataclass(frozen=True)
class WeightFormat:
    kind: str = "int8"
    group: int = 32
    symmetric: bool = False
    activations: str = "auto"


@dataclass(frozen=True)
class Gate:
    kind: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class PlacedBuffer:
    address: int
    bytes: int
    nodes: tuple[int, ...]
    interleaved: bool
    owner: str


@dataclass(frozen=True)
class OperatorStats:
    calls: int
    seconds: float
    bytes_read: int
    remote_bytes: int


class Runtime:
    def __init__(self, layout):
        self.layout = layout


def view(matrix: Matrix) -> torch.Tensor:
    dtype = DTYPES[matrix.dtype]
    extent = 1 + (matrix.rows - 1) * matrix.row_stride + (matrix.columns - 1) * matrix.column_stride
    raw = (ctypes.c_char * (extent * dtype.itemsize)).from_address(matrix.address)
    return torch.frombuffer(raw, dtype=dtype, count=extent).as_strided(
        (matrix.rows, matrix.columns), (matrix.row_stride, matrix.column_stride)
    )


class _Weights:
    def __init__(self, parts, owner):
        self.parts, self.owner, self.calls, self.isa = parts, owner, 0, "fake"

    def buffers(self):
        return [PlacedBuffer(0, 4096, part.memory_nodes, part.interleaved, self.owner) for part in self.parts]

    def stats(self):
        return OperatorStats(self.calls, 0.0, self.calls * self.packed_bytes, 0)


class LinearWeights(_Weights):
    def __init__(self, runtime, *, out_features, in_features, format, parts, has_bias, owner):
        super().__init__(parts, owner)
        self.weight, self.bias = torch.full((out_features, in_features), torch.nan), torch.zeros(out_features)
        self.packed_bytes = self.weight.nbytes * len(parts)

    def load_weight(self, matrix, *, first_row=0):
        self.weight[first_row : first_row + matrix.rows] = view(matrix).float()

    def load_bias(self, matrix):
        self.bias[:] = view(matrix)[0].float()

    def unpack(self, out, *, part=0):
        view(out).copy_(self.weight)

    def forward(self, x, out):
        self.calls += 1
        view(out).copy_(view(x).float() @ self.weight.T + self.bias)


class ExpertsWeights(_Weights):
    def __init__(self, runtime, *, experts, hidden, intermediate, format, gate, parts, has_bias, owner):
        super().__init__(parts, owner)
        self.kind, self.E = gate, experts
        self.w = {
            "gate": torch.full((experts, intermediate, hidden), torch.nan),
            "up": torch.full((experts, intermediate, hidden), torch.nan),
            "down": torch.full((experts, hidden, intermediate), torch.nan),
        }
        self.b = {name: torch.zeros(experts, weight.shape[1]) for name, weight in self.w.items()}
        self.packed_bytes = sum(weight.nbytes for weight in self.w.values())

    def load_experts(self, gate=(), up=(), down=(), first_expert=0):
        for name, matrices in (("gate", gate), ("up", up), ("down", down)):
            for index, matrix in enumerate(matrices, first_expert):
                self.w[name][index] = view(matrix).float()

    def __getattr__(self, name):
        verb, _, piece = name.partition("_")
        if verb == "unpack":
            return lambda expert, out: view(out).copy_(self.w[piece][expert])
        if verb == "load" and piece.endswith("_bias"):
            return lambda expert, m: self.b[piece.removesuffix("_bias")].__setitem__(expert, view(m)[0].float())
        raise AttributeError(name)

    def forward(self, x, ids, weights, out):
        self.calls += 1
        x, ids, weights = view(x).float(), view(ids), view(weights).float()
        if ((ids < 0) | (ids > self.E)).any():
            token = int(((ids < 0) | (ids > self.E)).any(1).nonzero()[0])
            raise IndexError(f"{self.owner}: token {token} chose expert {ids[token].tolist()} of {self.E}")
        result = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for slot in range(ids.shape[1]):
                if (e := int(ids[token, slot])) < self.E:
                    g = self.w["gate"][e] @ x[token] + self.b["gate"][e]
                    u = self.w["up"][e] @ x[token] + self.b["up"][e]
                    a = apply_gate(self.kind, g, u)
                    result[token] += weights[token, slot] * (self.w["down"][e] @ a + self.b["down"][e])
        view(out).copy_(result)


def apply_gate(gate, g, u):
    f = torch.nn.functional
    if gate.kind == "clamped_swiglu":
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
        return g * torch.sigmoid(gate.alpha * g) * (u + 1)
    act = {"silu": f.silu, "relu": f.relu, "gelu": f.gelu, "gelu_tanh": lambda v: f.gelu(v, approximate="tanh")}
    return act[gate.kind](g) * u


def linear_packed_bytes(out_features, in_features, format, has_bias, parts):
    return [(part.end - part.begin) * in_features for part in parts]


def experts_packed_bytes(experts, hidden, intermediate, format, has_bias, parts):
    return [3 * experts * hidden * (part.end - part.begin) for part in parts]
