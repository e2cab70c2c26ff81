"""High halves of inner rows as lists, for every ISA and format that has them (native/kernels/listed_int8.h, listed_nibbles.h, gemm_amx.cpp)."""

from __future__ import annotations

import numpy as np
import pytest
from native_operands import EXPERTS_BAR, ISAS, describe_worst, error, name_of
from test_experts import Mixture

from numagraft.native import WeightFormat

INT8 = [WeightFormat("int8")]
NIBBLES = [
    WeightFormat("int4"),
    WeightFormat("int4", symmetric=True),
    WeightFormat("int4", group=128),
    WeightFormat("mxfp4"),
]
#: rows of an expert in the mean from which inner rows have lists (native/kernels/table_row.cpp)
LISTED_FROM = [
    ("avx2", NIBBLES, 2),
    ("avx512", NIBBLES, 2),
    ("avx512_vnni", NIBBLES, 4),
    ("avx512_vnni", INT8, 8),
    ("amx", INT8, 32),
]
EXPERTS, TOPK = 4, 2
CASES = [
    pytest.param(isa, format, mean * times, id=f"{isa}-{name_of(format)}-{mean * times}")
    for isa, formats, mean in LISTED_FROM
    for format in formats
    for times in (3, 6, 24)  # tokens, of which an expert gets half
    if isa in ISAS
]
pytestmark = pytest.mark.skipif(not CASES, reason="this CPU has no AVX2")


def call(mixture, tokens, seed=5):
    """Inputs of one far channel, and what they make together and one by one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, mixture.hidden)).astype(np.float32)
    x[:, 3] *= 20
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOPK].astype(np.int64)
    weights = rng.random((tokens, TOPK)).astype(np.float32)
    alone = [mixture(x[i : i + 1], ids[i : i + 1], weights[i : i + 1]) for i in range(tokens)]
    return mixture(x, ids, weights), np.concatenate(alone), mixture.expected(x, ids, weights)


@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 320), (64, 2304)])
@pytest.mark.parametrize(("isa", "format", "tokens"), CASES)
def test_high_halves_of_inner_rows_are_listed(isa, format, tokens, hidden, intermediate):
    """From so many rows per expert on: a block of one strip, of several, and more than one block."""
    together, alone, expected = call(Mixture(EXPERTS, hidden, intermediate, format, isa=isa), tokens)
    assert error(together, expected) <= EXPERTS_BAR[format.kind], describe_worst(together, expected)
    assert (together != alone).mean() > 0.5  # the control: another path was taken
    whole = WeightFormat(format.kind, group=format.group, symmetric=format.symmetric, activations="bf16")
    together, _, expected = call(Mixture(EXPERTS, hidden, intermediate, whole, isa=isa), tokens)
    assert error(together, expected) <= 2.5e-3  # which 15 bits do not list


@pytest.mark.parametrize(("isa", "format", "tokens"), CASES)
def test_what_is_listed_counts(isa, format, tokens):
    """Inner rows whose few features far beyond the others make most of the output, at both ends and in every group."""
    rng = np.random.default_rng(4)
    intermediate, far = 1216, [0, 31, 32, 63, 64, 517, 702, 1215]
    gate = np.abs(rng.standard_normal((intermediate, 64))).astype(np.float32) / 8
    up = rng.standard_normal((intermediate, 64)).astype(np.float32) / 8
    up[far] *= 40
    mixture = Mixture(2, 64, intermediate, format, isa=isa, source={"gate": [gate, gate], "up": [up, up]}.items())
    x = np.abs(rng.standard_normal((tokens, 64))).astype(np.float32)
    ids, weights = np.tile(np.array([[0, 1]], np.int64), (tokens, 1)), np.ones((tokens, 2), np.float32)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert error(found, expected) <= EXPERTS_BAR[format.kind], describe_worst(found, expected)
    for feature in far:  # the control: each of them is seen
        kept = mixture.dequantised["down"][:, :, feature].copy()
        mixture.dequantised["down"][:, :, feature] = 0
        assert error(found, mixture.expected(x, ids, weights)) > EXPERTS_BAR[format.kind], feature
        mixture.dequantised["down"][:, :, feature] = kept
