"""Weights that are widened once for several strips of rows (native/kernels/widened.h), where there is neither VNNI nor tiles."""

from __future__ import annotations

import numpy as np
import pytest
from native_operands import EXPERTS_BAR, ISAS, describe_worst, error, name_of
from test_experts import Mixture
from test_linear import Layer

from numagraft.native import WeightFormat

WIDENING = [isa for isa in ISAS if isa in ("avx2", "avx512")]
NIBBLES = [
    WeightFormat("int4"),
    WeightFormat("int4", symmetric=True),
    WeightFormat("int4", group=128),
    WeightFormat("mxfp4"),
]
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


@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 320), (64, 2304)])
@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WIDENING)
def test_inner_rows_of_nibbles_come_whole(isa, format, hidden, intermediate):
    """From 6 rows per expert on; with fewer they come in halves. Spans of 1024 inputs (mxfp4: 512) have scales of their own."""
    rng = np.random.default_rng(5)
    mixture = Mixture(4, hidden, intermediate, format, isa=isa)
    x = rng.standard_normal((48, hidden)).astype(np.float32)
    x[:, 3] *= 20
    ids = np.argsort(rng.random((48, 4)), axis=1)[:, :2].astype(np.int64)
    ids[7] = [0, 1]  # 24 rows per expert in the mean, whatever these are
    weights = rng.random((48, 2)).astype(np.float32)
    together = mixture(x, ids, weights)
    alone = np.concatenate([mixture(x[i : i + 1], ids[i : i + 1], weights[i : i + 1]) for i in range(48)])
    expected = mixture.expected(x, ids, weights)
    assert error(together, expected) <= EXPERTS_BAR[format.kind], describe_worst(together, expected)
    assert error(together, expected) <= 1.05 * error(alone, expected)
    assert (together != alone).mean() > 0.5  # the control: another path was taken
    exact = Mixture(4, hidden, intermediate, WeightFormat(format.kind, group=format.group, symmetric=format.symmetric, activations="bf16"), isa=isa)
    assert error(exact(x, ids, weights), expected) <= 2.5e-3  # which 15 bits do not take


@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WIDENING)
def test_columns_of_zeros_and_of_one_large_weight(isa, format):
    """Their scale in a span is 0, or what one weight makes of it."""
    down = np.random.default_rng(1).standard_normal((64, 1152)).astype(np.float32) / 30
    down[5] = 0
    down[9, 700] = 40  # 1200 times the others of its column, which are then rounded to steps twice as large as they are
    mixture = Mixture(2, 64, 1152, format, isa=isa, source={"down": [down, down]}.items())
    x = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32)
    ids, weights = np.tile(np.array([[0, 1]], np.int64), (32, 1)), np.ones((32, 2), np.float32)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert (found[:, 5] == 0).all()
    others = np.arange(64) != 9
    assert error(found[:, others], expected[:, others]) <= EXPERTS_BAR[format.kind], describe_worst(found, expected)
    assert error(found[:, 9], expected[:, 9]) <= 0.03
    assert error(found[:, 9] * 1.04, expected[:, 9]) > 0.03  # the control
