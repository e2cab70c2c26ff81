"""Who reads what, seen from Python: the counters show whether replicas divide a prefill by tokens or a decode by columns."""

from __future__ import annotations

import pytest
import torch
from grafting import graft
from small_experts import qwen, routed
from torch import nn

from numagraft import operator_stats, optimize
from numagraft.operators.experts import Experts
from numagraft.runtime import RuntimeLayout
from tests import models


def copies_read(grafted, *inputs: torch.Tensor) -> float:
    """Weight bytes read by one call, in units of one copy of the weights."""
    copies = 2 if grafted.placement.policy == "mirror" else 1
    before = grafted.stats()
    grafted(*inputs)
    after = grafted.stats()
    assert after.calls == before.calls + 1 and after.seconds > before.seconds
    return (after.bytes_read - before.bytes_read) * copies / grafted.grafted_bytes()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    ("policy", "tokens", "copies"),
    [("mirror", 1, 1), ("mirror", 256, 2), ("shard", 1, 1), ("shard", 256, 1), ("bind", 256, 1), ("interleave", 256, 1)],
)
def test_a_mirrored_linear_divides_a_prefill_by_tokens(format, policy, tokens, copies):
    """By tokens, each node reads its whole copy; by columns, all nodes together read one."""
    module = nn.Linear(256, 512, bias=False).requires_grad_(False)
    grafted = graft(module, format=format, policy=policy, nodes=2)
    assert copies_read(grafted, torch.randn(tokens, 256)) == pytest.approx(copies, rel=0.05)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("policy", "tokens", "copies"), [("mirror", 1, 1), ("mirror", 256, 2), ("shard", 1, 1), ("shard", 256, 1)])
def test_mirrored_experts_divide_a_prefill_by_tokens(format, policy, tokens, copies):
    grafted = graft(qwen(8, 128, 256), operator=Experts, format=format, policy=policy, nodes=2)
    index, weights = routed(tokens, 8, 8)  # every token chooses every expert
    assert copies_read(grafted, torch.randn(tokens, 128), index, weights) == pytest.approx(copies, rel=0.05)


def test_decode_reads_the_chosen_experts_only():
    grafted = graft(qwen(8, 128, 256), operator=Experts)
    index, weights = routed(1, 8, 2)
    assert copies_read(grafted, torch.randn(1, 128), index, weights) == pytest.approx(2 / 8, rel=0.05)


def test_a_whole_models_table():
    rules = {
        "schema": 1,
        "rules": [
            {"id": "experts", "match": {"role": "experts"}, "replace": {"class": "experts", "kwargs": {"placement": "shard"}}},
            {"id": "attention", "match": {"role": "linear"}, "replace": {"class": "linear"}},
        ],
    }
    model = optimize(models.build(models.qwen3_moe()), rules, runtime=RuntimeLayout.virtual(2))
    before = operator_stats(model)
    tokens = torch.tensor([[1, 5, 9]])
    model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False, pad_token_id=0)
    rows = {rule.rule_id: rule for rule in operator_stats(model).since(before).rules}
    layers = model.config.num_hidden_layers
    assert rows["experts"].modules == layers and rows["experts"].calls == 4 * layers
    assert rows["attention"].modules == 4 * layers and rows["attention"].calls == 16 * layers
    assert all(rule.seconds > 0 and rule.gbps > 0 and rule.remote_bytes == 0 for rule in rows.values())
    assert "attention" in str(operator_stats(model))
