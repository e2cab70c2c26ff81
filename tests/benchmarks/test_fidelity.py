"""The reference model, the transforms that must not change its function, and the figures' arithmetic."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import smollm2
from benchmarks.fidelity import compare, rules
from benchmarks.transforms import RotatedLinear, random_orthogonal, rotate, upcycled

try:
    smollm2.gguf_path()
except FileNotFoundError as missing:
    pytestmark = pytest.mark.skip(reason=str(missing))


@pytest.fixture(scope="module")
def ids():
    return smollm2.text_tokens(8192)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@torch.inference_mode()
def test_the_reference_understands_english(ids):
    """A wrong permutation, theta or tokenizer gives perplexities in the hundreds."""
    reference = smollm2.load_reference()
    found = compare(lambda x: reference(x).logits, lambda x: reference(x).logits, ids[:512], context=512)
    assert 5 < found.perplexity_reference < 40
    # torch sums in another order where a buffer lies differently: fp32 rounding (1e-7) over logits of about 30
    assert found.ratio == pytest.approx(1, abs=3e-5)
    assert abs(found.mean_kl) < 3e-6
    assert found.top1_agreement > 0.99


@torch.inference_mode()
def test_upcycling_keeps_the_logits(ids):
    model = smollm2.load_reference(layers=3)
    moe = upcycled(model)
    expected = model(ids[None, :64]).logits
    assert relative(moe(ids[None, :64]).logits, expected) < 1e-4
    moe.model.layers[1].mlp.experts.down_proj[1] *= 1.5  # negative control: one changed expert shows
    assert relative(moe(ids[None, :64]).logits, expected) > 1e-3


@pytest.mark.parametrize("moe", [False, True])
@torch.inference_mode()
def test_rotation_keeps_the_logits_and_leaves_the_grid(moe, ids):
    model = smollm2.load_reference(layers=3)
    expected = model(ids[None, :64]).logits
    grid = model.model.layers[0].self_attn.q_proj.weight[0, :32]
    assert len(grid.unique()) <= 16
    if moe:
        model = upcycled(model)
    rotate(model, lm_head=True)
    turned = model.model.layers[0].self_attn.q_proj.inner.weight[0, :32]
    assert len(turned.unique()) > 30
    assert relative(model(ids[None, :64]).logits, expected) < 1e-4
    model.model.layers[1].self_attn.v_proj.rotation = random_orthogonal(576, seed=99)
    assert relative(model(ids[None, :64]).logits, expected) > 1e-3


def test_an_orthogonal_matrix_is_one():
    q = random_orthogonal(96, seed=0)
    assert torch.allclose(q @ q.T, torch.eye(96), atol=1e-5)
    linear = nn.Linear(96, 8)
    x = torch.randn(3, 96)
    assert torch.allclose(RotatedLinear(linear, q)(x), linear(x), atol=1e-5)
    small = RotatedLinear(linear, random_orthogonal(8, seed=1), side="output")
    assert torch.allclose(small(x), linear(x), atol=1e-5)
    small.rotation = random_orthogonal(8, seed=2)
    assert not torch.allclose(small(x), linear(x), atol=1e-2)


def test_figures_of_known_distributions():
    """Reference p = (1/2, 1/4, 1/4), candidate uniform; the next token is always 0."""
    ids = torch.zeros(9, dtype=torch.long)
    p = torch.tensor([0.5, 0.25, 0.25])
    found = compare(lambda x: p.log().expand(1, x.shape[1], 3), lambda x: torch.zeros(1, x.shape[1], 3), ids, context=3)
    assert found.positions == 6
    assert found.perplexity_reference == pytest.approx(2)
    assert found.perplexity == pytest.approx(3)
    assert found.ratio == pytest.approx(1.5)
    assert found.mean_kl == pytest.approx(math.log(3) - 1.5 * math.log(2), abs=1e-6)


def test_logits_that_are_not_finite_are_an_error():
    ids = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="not finite"):
        compare(
            lambda x: torch.zeros(1, x.shape[1], 3), lambda x: torch.full((1, x.shape[1], 3), math.nan), ids, context=4
        )
    with pytest.raises(ValueError, match="fill one window"):
        compare(lambda x: x, lambda x: x, ids, context=5)


def test_the_text_is_long_enough(ids):
    assert len(ids) == 8192
    with pytest.raises(ValueError, match="asked for"):
        smollm2.text_tokens(10**6)


def test_rules_name_what_was_asked():
    assert [rule["id"] for rule in rules("int4", moe=True, lm_head=True, kwargs={})["rules"]] == [
        "linear",
        "experts",
        "lm-head",
    ]
    assert rules("int8", moe=False, lm_head=False, kwargs={"activations": "bf16"})["rules"][0]["replace"]["kwargs"] == {
        "format": "int8",
        "activations": "bf16",
    }
