"""int4 and mxfp4 without VNNI: chunks unpacked for several strips of rows (native/kernels/unpacked_nibbles.h)."""

from __future__ import annotations

import numpy as np
import pytest
from native_operands import EXPERTS_BAR, ISAS, describe_worst, error, name_of
from test_experts import Mixture
from test_linear import Layer

from numagraft.native import WeightFormat

WITHOUT_VNNI = [isa for isa in ISAS if isa in ("avx2", "avx512")]
NIBBLES = [
    WeightFormat("int4"),
    WeightFormat("int4", symmetric=True),
    WeightFormat("int4", group=128),
    WeightFormat("mxfp4"),
]
pytestmark = pytest.mark.skipif(not WITHOUT_VNNI, reason="this CPU has no AVX2")


@pytest.mark.parametrize("far", [1, 20], ids=["low-halves", "with-high-halves"])
@pytest.mark.parametrize(("rows", "in_features"), [(11, 64), (23, 1088), (70, 1216)])
@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WITHOUT_VNNI)
def test_many_rows_give_what_each_gives_alone(isa, format, rows, in_features, far):
    """Chunks of 512 inputs, the last of them shorter; blocks of 32 rows, the second of whose tiles has a row with high halves.

    Weights far out: of normal ones nearly all scales are within a factor of 8, and stay exact."""
    layer = Layer(70, in_features, format, isa=isa, change=lambda values: values**3)
    x = np.random.default_rng(rows).standard_normal((rows, in_features)).astype(np.float32)
    x[rows // 2 :: 17, ::97] *= far
    together = layer(x)
    alone = np.concatenate([layer(row[None]) for row in x])
    assert error(together, alone) <= 6e-4, describe_worst(together, alone)
    assert error(together[::-1], alone) > 0.5  # the control: rows are told apart


@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WITHOUT_VNNI)
def test_groups_far_smaller_than_others_of_their_chunk(isa, format):
    """A chunk's largest scale sets the steps of all: what small groups lose is nothing beside it, and everything without it."""

    def change(values):
        values[:, :32] *= 1000
        return values

    layer = Layer(64, 1024, format, isa=isa, bias=False, change=change)
    x = np.random.default_rng(3).standard_normal((70, 1024)).astype(np.float32)
    alone = np.concatenate([layer(row[None]) for row in x])
    assert error(layer(x), alone) <= 4e-3
    beyond, beside = x.copy(), x.copy()
    beyond[:, :512] = 0  # the second chunk has scales of its own
    beside[:, :32] = 0  # the control: the first chunk's steps show where nothing large meets them
    alone = np.concatenate([layer(row[None]) for row in beyond])
    assert error(layer(beyond), alone) <= 4e-4
    alone = np.concatenate([layer(row[None]) for row in beside])
    assert error(layer(beside), alone) > 4e-2


@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WITHOUT_VNNI)
def test_columns_of_zeros_and_of_one_large_weight(isa, format):
    down = np.random.default_rng(1).standard_normal((64, 1152)).astype(np.float32) / 30
    down[5] = 0
    down[9, 700] = 40  # 1200 times the others of its column, whose scales in that chunk are then steps or nothing
    mixture = Mixture(2, 64, 1152, format, isa=isa, source={"down": [down, down]}.items())
    x = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32)
    ids, weights = np.tile(np.array([[0, 1]], np.int64), (32, 1)), np.ones((32, 2), np.float32)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert np.abs(found[:, 5]).max() <= 1e-30
    others = np.arange(64) != 9
    assert error(found[:, others], expected[:, others]) <= EXPERTS_BAR[format.kind], describe_worst(found, expected)
    assert error(found[:, 9], expected[:, 9]) <= 0.03
    assert error(found[:, 9] * 1.04, expected[:, 9]) > 0.03  # the control
