"""Small models of real families: random weights, real structure. Sizes deliberately differ from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

_BASE: dict[str, object] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: object) -> LlamaConfig:
    """A dense decoder: 2 layers, grouped queries, tied or untied head."""
    return LlamaConfig(**(_BASE | changes))


def qwen3_moe(**changes: object) -> Qwen3MoeConfig:
    """A mixture of experts: 2 sparse layers of 4 experts, top 2; saved with one tensor per expert."""
    base = _BASE | {"moe_intermediate_size": 48, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(**(base | changes))


CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {"llama": llama, "qwen3_moe": qwen3_moe}


def deepseek_v3() -> DeepseekV3Config:
    """Latent attention, one dense layer, groups of experts with a correction bias, a shared expert."""
    attention = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    more = {"num_key_value_heads": 4, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
    return DeepseekV3Config(**(_BASE | attention | experts | more))


def glm4_moe() -> Glm4MoeConfig:
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return Glm4MoeConfig(**_BASE, **experts, moe_intermediate_size=48, head_dim=16)


def qwen2_moe() -> Qwen2MoeConfig:
    """A shared expert behind a gate of its own."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return Qwen2MoeConfig(**_BASE, **experts, shared_expert_intermediate_size=80)


#: families whose checkpoints name and shape things differently: per-expert or fused, transposed, with biases, tied, conv1d
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v3": deepseek_v3,
    "gemma3": lambda: Gemma3TextConfig(**_BASE, head_dim=16, layer_types=["sliding_attention", "full_attention"]),
    "glm4_moe": glm4_moe,
    "gpt2": lambda: GPT2Config(vocab_size=131, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "gpt_oss": lambda: GptOssConfig(**_BASE, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "llama4": lambda: Llama4TextConfig(**_BASE, head_dim=16, num_local_experts=4, intermediate_size_mlp=96),
    "mixtral": lambda: MixtralConfig(**_BASE, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**_BASE, num_experts=4, num_experts_per_tok=2),
    "phi3": lambda: Phi3Config(**_BASE),
    "qwen2_moe": qwen2_moe,
}


def build(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with random weights of a size that keeps activations finite."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save(model: PreTrainedModel, directory: Path, *, max_shard_size: str = "50GB") -> Path:
    """The model as a safetensors checkpoint, as transformers writes it."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
