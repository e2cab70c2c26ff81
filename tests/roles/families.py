"""The model families whose roles are checked and documented: transformers' own configs, cut to a few layers, on meta."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import AutoConfig

from numagraft import skeleton

FOUR = {"num_hidden_layers": 4}
FEW_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8}

#: title -> (model_type, changes to the config's defaults); sizes stay real, since meta tensors cost nothing
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("llama", FOUR),
    "SmolLM3": ("smollm3", {}),
    "Mistral": ("mistral", FOUR),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3": ("gemma3", {}),
    "Gemma 4": ("gemma4_text", {}),
    "Phi": ("phi", FOUR),
    "Phi-3": ("phi3", FOUR),
    "OLMo 2": ("olmo2", FOUR),
    "GLM-4": ("glm4", FOUR),
    "Granite": ("granite", FOUR),
    "Cohere 2": ("cohere2", {}),
    "StarCoder 2": ("starcoder2", FOUR),
    "Falcon": ("falcon", FOUR),
    "GPT-NeoX": ("gpt_neox", FOUR),
    "GPT-2": ("gpt2", {"n_layer": 4}),
    "OPT": ("opt", FOUR),
    "Seed-OSS": ("seed_oss", FOUR),
    "EXAONE 4": ("exaone4", {}),
    "ERNIE 4.5": ("ernie4_5", FOUR),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3-MoE": ("qwen3_moe", FOUR),
    "Qwen3-Next": ("qwen3_next", {}),
    "Qwen3.5-MoE": ("qwen3_5_moe", {}),
    "Mixtral": ("mixtral", FOUR),
    "DeepSeek-V2": ("deepseek_v2", {**FOUR, "first_k_dense_replace": 1}),
    "DeepSeek-V3": ("deepseek_v3", {**FOUR, "first_k_dense_replace": 1}),
    "DeepSeek-V3.2": ("deepseek_v32", {}),
    "Kimi K2 (DeepSeek's layout)": ("deepseek_v3", {**FOUR, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "Kimi Linear": ("kimi_linear", {}),
    "GLM-4-MoE": ("glm4_moe", FOUR),
    "GLM-4-MoE-Lite": ("glm4_moe_lite", FOUR),
    "MiniMax": ("minimax", {}),
    "MiniMax-M2": ("minimax_m2", FOUR),
    "gpt-oss": ("gpt_oss", {}),
    "Phi-MoE": ("phimoe", FOUR),
    "OLMoE": ("olmoe", FOUR),
    "FlexOlmo": ("flex_olmo", FOUR),
    "Granite-MoE": ("granitemoe", FOUR),
    "Granite-MoE-Hybrid": ("granitemoehybrid", {}),
    "ERNIE-4.5-MoE": ("ernie4_5_moe", FOUR),
    "Llama 4": ("llama4", {}),
    "AFMoE": ("afmoe", {}),
    "Jamba": ("jamba", {}),
    "Nemotron-H": ("nemotron_h", {}),
    "LongCat-Flash": ("longcat_flash", {"num_layers": 2}),
    "JetMoE": ("jetmoe", FOUR),
    "MiMo-V2-Flash": ("mimo_v2_flash", {}),
}

MIXTURES = tuple(FAMILIES)[tuple(FAMILIES).index("Qwen2-MoE") :]
#: state-space layers by default, no attention
WITHOUT_ATTENTION = ("Granite-MoE-Hybrid",)
#: the whole layer is one linear stack without a module for its feed-forward part
WITHOUT_MLP = ("OPT",)


@cache
def build(title: str) -> nn.Module:
    model_type, changes = FAMILIES[title]
    return skeleton.build(AutoConfig.for_model(model_type, **changes))
