"""Weights that are widened once for several strips of rows (native/kernels/widened.h), where there is neither VNNI nor tiles."""

from __future__ import annotations

import numpy as np
import pytest
from native_operands import ISAS, describe_worst, error
from test_linear import Layer

from numagraft.native import WeightFormat

WIDENING = [isa for isa in ISAS if isa in ("avx2", "avx512")]
pytestmark = pytest.mark.skipif(not WIDENING, reason="this CPU has no AVX2")


@pytest.mark.parametrize(("rows", "in_features"), [(13, 64), (40, 600), (70, 1216)])
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0), ("bf16", 0), ("fp8", 1e-6)])
@pytest.mark.parametrize("isa", WIDENING)
def test_many_rows_give_what_each_gives_alone(isa, kind, tolerance, rows, in_features):
    """Chunks of 256 inputs (floats: 128), the last of them shorter; strips of six rows and of fewer."""
    layer = Layer(70, in_features, WeightFormat(kind), isa=isa)
    x = np.random.default_rng(rows).standard_normal((rows, in_features)).astype(np.float32)
    together = layer(x)
    alone = np.concatenate([layer(few) for few in np.array_split(x, rows // 4)])  # 4 to 6 rows: one strip
    assert error(together, alone) <= tolerance, describe_worst(together, alone)
    assert error(together[::-1], alone) > 0.5  # the control: rows are told apart


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("isa", WIDENING)
def test_whole_integers_lose_a_thousandth(isa, rows):
    layer = Layer(64, 1024, WeightFormat("int8"), isa=isa)
    x = np.random.default_rng(3).standard_normal((rows, 1024)).astype(np.float32)
    assert error(layer(x), layer.expected(x)) <= 1.5e-3
    scale = np.abs(x).max(axis=1, keepdims=True) / 127  # the control: what int8 integers lose
    assert error(layer.expected(np.round(x / scale) * scale), layer.expected(x)) > 5e-3
