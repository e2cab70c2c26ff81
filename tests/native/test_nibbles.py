"""int4 and mxfp4 without VNNI: chunks unpacked for several strips of rows, and high halves of inner rows as lists
(native/kernels/unpacked_nibbles.h, listed_nibbles.h)."""

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
    x = np.random.default_rng(3).standard_normal((20, 1024)).astype(np.float32)
    alone = np.concatenate([layer(row[None]) for row in x])
    assert error(layer(x), alone) <= 4e-3
    beyond, beside = x.copy(), x.copy()
    beyond[:, :512] = 0  # the second chunk has scales of its own
    beside[:, :32] = 0  # the control: the first chunk's steps show where nothing large meets them
    alone = np.concatenate([layer(row[None]) for row in beyond])
    assert error(layer(beyond), alone) <= 4e-4
    alone = np.concatenate([layer(row[None]) for row in beside])
    assert error(layer(beside), alone) > 4e-2


@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 320), (64, 2304)])
@pytest.mark.parametrize("tokens", [6, 12, 48])
@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WITHOUT_VNNI)
def test_high_halves_of_inner_rows_are_listed(isa, format, tokens, hidden, intermediate):
    """From 2 rows per expert on: one strip, or several."""
    rng = np.random.default_rng(5)
    mixture = Mixture(4, hidden, intermediate, format, isa=isa)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    x[:, 3] *= 20
    ids = np.argsort(rng.random((tokens, 4)), axis=1)[:, :2].astype(np.int64)
    weights = rng.random((tokens, 2)).astype(np.float32)
    together = mixture(x, ids, weights)
    alone = np.concatenate([mixture(x[i : i + 1], ids[i : i + 1], weights[i : i + 1]) for i in range(tokens)])
    expected = mixture.expected(x, ids, weights)
    assert error(together, expected) <= EXPERTS_BAR[format.kind], describe_worst(together, expected)
    assert (together != alone).mean() > 0.5  # the control: another path was taken
    exact = Mixture(4, hidden, intermediate, WeightFormat(format.kind, group=format.group, symmetric=format.symmetric, activations="bf16"), isa=isa)
    assert error(exact(x, ids, weights), expected) <= 2.5e-3  # which 15 bits do not list


@pytest.mark.parametrize("format", NIBBLES, ids=name_of)
@pytest.mark.parametrize("isa", WITHOUT_VNNI)
def test_what_is_listed_counts(isa, format):
    """Inner rows whose few features far beyond the others make most of the output, at both ends and in every group."""
    rng = np.random.default_rng(4)
    intermediate, far = 1216, [0, 31, 32, 63, 64, 517, 702, 1215]
    gate = np.abs(rng.standard_normal((intermediate, 64))).astype(np.float32) / 8
    up = rng.standard_normal((intermediate, 64)).astype(np.float32) / 8
    up[far] *= 40
    mixture = Mixture(2, 64, intermediate, format, isa=isa, source={"gate": [gate, gate], "up": [up, up]}.items())
    x = np.abs(rng.standard_normal((32, 64))).astype(np.float32)
    ids, weights = np.tile(np.array([[0, 1]], np.int64), (32, 1)), np.ones((32, 2), np.float32)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert error(found, expected) <= EXPERTS_BAR[format.kind], describe_worst(found, expected)
    for feature in far:  # the control: each of them is seen
        kept = mixture.dequantised["down"][:, :, feature].copy()
        mixture.dequantised["down"][:, :, feature] = 0
        assert error(found, mixture.expected(x, ids, weights)) > EXPERTS_BAR[format.kind], feature
        mixture.dequantised["down"][:, :, feature] = kept


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
