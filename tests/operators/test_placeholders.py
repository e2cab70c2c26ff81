from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from numagraft.errors import UnsupportedOperationError
from numagraft.operators.placeholders import AbsentWeight, AbsentWeightError, placeholder


@pytest.fixture
def weight() -> AbsentWeight:
    return AbsentWeight("model.lm_head.weight", torch.Size([3, 4]), torch.bfloat16, torch.device("cpu"))


def test_a_placeholder_takes_no_memory_and_keeps_name_shape_dtype():
    made = placeholder(torch.ones(3, 4, dtype=torch.float16))
    assert made.is_meta and made.shape == (3, 4) and made.dtype == torch.float16 and not made.requires_grad


def test_it_answers_what_families_peek_at(weight):
    assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, torch.device("cpu"), (3, 4))
    assert weight.size() == (3, 4) and weight.size(-1) == 4 and weight.numel() == 12
    assert weight.dim() == weight.ndim == 2 and weight.element_size() == 2 and weight.is_floating_point()
    assert not weight.requires_grad and not weight.is_meta and weight.grad is None
    assert not isinstance(weight, torch.Tensor)
    assert torch.ones(1).to(weight.dtype).dtype == torch.bfloat16
    assert "packed by numagraft" in repr(weight)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w, x: F.linear(x, w),
        lambda w, x: x @ w,
        lambda w, x: w @ x,
        lambda w, x: x * w,
        lambda w, x: w * x,
        lambda w, x: 2 * w,
        lambda w, x: w + 1,
        lambda w, x: -w,
        lambda w, x: torch.mm(x, w),
        lambda w, x: torch.cat([x, w]),
        lambda w, x: torch.stack((w, w)),
        lambda w, x: torch.matmul(input=x, other=w),
        lambda w, x: w[0],
        lambda w, x: w.__setitem__(0, x),
        lambda w, x: w.t(),
        lambda w, x: w.T,
        lambda w, x: w.data,
        lambda w, x: w.float(),
        lambda w, x: w.to("cpu"),
        lambda w, x: w.chunk(2),
        lambda w, x: list(w),
        lambda w, x: len(w),
        lambda w, x: bool(w),
        lambda w, x: torch.empty_like(w),
    ],
)
def test_anything_that_computes_is_refused_by_name(weight, compute):
    with pytest.raises(UnsupportedOperationError, match=r"model\.lm_head\.weight is packed by numagraft.*class: default"):
        compute(weight, torch.ones(2, 4))


def test_an_unknown_attribute_is_absent_for_hasattr(weight):
    assert not hasattr(weight, "CB")
    assert getattr(weight, "_is_hf_initialized", False) is False
    with pytest.raises(AbsentWeightError, match="'CB'"):
        _ = weight.CB
