"""Whole models of the six families that must work, from a checkpoint on disk, through a rule file, to logits and text."""

from __future__ import annotations

import pytest
import torch

from numagraft import load_and_optimize
from numagraft.operators.experts import Experts
from numagraft.operators.linear import Linear
from numagraft.runtime import RuntimeLayout
from tests import models

# every token chooses every expert: a rounding can then not change a routing, and errors stay errors of arithmetic
COMMON = {
    "vocab_size": 131, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 24, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts_per_tok": 4,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 80, "intermediate_size": 144, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 80},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 80, "intermediate_size": 144, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 24, "num_key_value_heads": 4, "head_dim": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "moe_intermediate_size": 80, "intermediate_size": 144, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    },
    "olmoe": {"num_experts": 4, "intermediate_size": 80},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 80, "layer_types": ["full_attention", "sliding_attention"]},
}  # fmt: skip
RULES = """
schema: 1
vars: {format: int8, placement: shard}
rules:
  - id: experts
    match: {role: experts}
    replace: {class: experts, kwargs: {format: "${vars.format}", placement: "${vars.placement}"}}
  - id: linears
    match: {role: linear}
    replace: {class: linear, kwargs: {format: "${vars.format}", placement: "${vars.placement}"}}
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, the original, its checkpoint)."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(request.param, **(COMMON | FAMILIES[request.param]))
    model = models.build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:  # hidden states that keep their size, biases that matter
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    path = models.save(model, tmp_path_factory.mktemp(request.param))
    return request.param, model.eval(), path


@pytest.mark.parametrize(("format", "bar"), [("bf16", 0.015), ("int8", 0.05)])
@pytest.mark.parametrize(("policy", "nodes"), [("shard", 2), ("mirror", 3), ("bind", 1)])
def test_logits_and_text(family, format, bar, policy, nodes, tmp_path):
    name, original, path = family
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    overrides = [f"vars.format={format}", f"vars.placement={policy}"]
    grafted = load_and_optimize(path, rules, overrides=overrides, runtime=RuntimeLayout.virtual(nodes))
    kinds = [type(module).__mro__ for module in grafted.modules()]
    experts = sum(Experts in mro for mro in kinds)
    assert experts == (1 if name in ("deepseek_v3", "glm4_moe") else 2)
    assert sum(Linear in mro for mro in kinds) >= 8
    tokens = torch.tensor([[1, 5, 9, 30, 77, 3, 128]])
    with torch.no_grad():
        expected, found = original(tokens).logits, grafted(tokens).logits
    assert ((found - expected).norm() / expected.norm()).item() <= bar
    text = grafted.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 12)
    assert grafted.num_parameters() == original.num_parameters()
