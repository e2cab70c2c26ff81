"""Small models on meta, from transformers' own config classes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig

from numagraft import skeleton

DENSE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128, "head_dim": 16}
DENSE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}


def dense(**changes: Any) -> nn.Module:
    return skeleton.build(AutoConfig.for_model("llama", **{**DENSE, **changes}))


def moe(**changes: Any) -> nn.Module:
    return skeleton.build(AutoConfig.for_model("qwen3_moe", **{**DENSE, **MOE, **changes}))
