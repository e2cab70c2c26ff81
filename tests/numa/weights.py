"""Small weights of every kind, made without torch or numpy: importing them costs seconds in an emulated guest.

Small also because packing int4 is thousands of times slower there; large enough for a slice on each of eight nodes.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from numagraft import native
from numagraft.native import Matrix, WeightFormat
from numagraft.placement import Part, Placement, PlacementSpec, resolve

FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")
EXPERTS, TOP_K = 2, 2
VALUES = [random.Random(1).gauss(0, 1) for _ in range(256)]


@dataclass(frozen=True)
class Units:
    """What placement must know of a module."""

    count: int
    multiple: int
    packed_bytes: int


@cache
def floats(rows: int, columns: int, seed: int) -> array:
    return array("f", map(VALUES.__getitem__, random.Random(seed).randbytes(rows * columns)))


def matrix(values: array, rows: int, columns: int) -> Matrix:
    kind = {"f": "f32", "q": "i64"}[values.typecode]
    return Matrix(values.buffer_info()[0], kind, rows, columns, columns)


class Linear:
    """A packed linear layer; `module` is its name in reports."""

    module = "layers.0.mlp.down_proj"
    out_features, in_features = 512, 128
    multiple = 32

    def __init__(self, runtime: native.Runtime, format: str, parts: Sequence[Part]) -> None:
        self.weights = native.LinearWeights(
            runtime,
            out_features=self.out_features,
            in_features=self.in_features,
            format=WeightFormat(format),
            parts=parts,
            has_bias=True,
            owner=self.module,
        )
        shape = (self.out_features, self.in_features)
        self.weights.load_weight(matrix(floats(*shape, 1), *shape))
        self.weights.load_bias(matrix(floats(1, self.out_features, 2), 1, self.out_features))
        assert self.weights.missing() == []

    @classmethod
    def units(cls, format: str) -> Units:
        whole = [Part((0,), False, (0,), 0, cls.out_features)]
        bytes = native.linear_packed_bytes(cls.out_features, cls.in_features, WeightFormat(format), True, whole)
        return Units(cls.out_features, cls.multiple, sum(bytes))

    def forward(self, tokens: int) -> array:
        x, out = floats(tokens, self.in_features, 3), array("f", bytes(4 * tokens * self.out_features))
        self.weights.forward(
            matrix(x, tokens, self.in_features), matrix(out, tokens, self.out_features)
        )
        return out


class Experts:
    """Packed experts, two for each token."""

    module = "layers.0.mlp.experts"
    hidden = 32

    @staticmethod
    def multiple(format: str) -> int:
        """As the operator says: fp8 has a scale for each 128 inputs of the down projection."""
        return 128 if format == "fp8" else 64

    def __init__(self, runtime: native.Runtime, format: str, parts: Sequence[Part]) -> None:
        self.intermediate = 8 * self.multiple(format)
        self.weights = native.ExpertsWeights(
            runtime,
            experts=EXPERTS,
            hidden=self.hidden,
            intermediate=self.intermediate,
            format=WeightFormat(format),
            gate=native.Gate("silu"),
            parts=parts,
            has_bias=False,
            owner=self.module,
        )
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        self.weights.load_experts(
            gate=[matrix(floats(*up, 10 + e), *up) for e in range(EXPERTS)],
            up=[matrix(floats(*up, 20 + e), *up) for e in range(EXPERTS)],
            down=[matrix(floats(*down, 30 + e), *down) for e in range(EXPERTS)],
        )
        assert self.weights.missing() == []

    @classmethod
    def units(cls, format: str) -> Units:
        intermediate = 8 * cls.multiple(format)
        whole = [Part((0,), False, (0,), 0, intermediate)]
        bytes = native.experts_packed_bytes(EXPERTS, cls.hidden, intermediate, WeightFormat(format), False, whole)
        return Units(intermediate, cls.multiple(format), sum(bytes))

    def forward(self, tokens: int) -> array:
        x, out = floats(tokens, self.hidden, 4), array("f", bytes(4 * tokens * self.hidden))
        ids = array("q", [(token + k) % EXPERTS for token in range(tokens) for k in range(TOP_K)])
        shares = array("f", [0.75, 0.25] * tokens)
        self.weights.forward(
            matrix(x, tokens, self.hidden),
            matrix(ids, tokens, TOP_K),
            matrix(shares, tokens, TOP_K),
            matrix(out, tokens, self.hidden),
        )
        return out


KINDS = {"linear": Linear, "experts": Experts}


def place(runtime: native.Runtime, kind: type, format: str, spec: PlacementSpec, **more) -> tuple:
    """(packed weights, their placement) as a rule with this placement would have them."""
    placement: Placement = resolve(spec, kind.units(format), runtime.layout, **more)
    return kind(runtime, format, placement.parts), placement


def difference(found: array, expected: array) -> float:
    """Relative, in the Frobenius norm."""
    norm = math.sqrt(math.fsum(v * v for v in expected))
    assert norm > 0 and len(found) == len(expected)
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(found, expected, strict=True))) / norm
