"""Small models of real families: random weights, real structure. Sizes deliberately differ from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)


def llama(**changes: object) -> LlamaConfig:
    """A dense decoder: 2 layers, grouped queries, tied or untied head."""
    base = {
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
    return LlamaConfig(**(base | changes))


def qwen3_moe(**changes: object) -> Qwen3MoeConfig:
    """A mixture of experts: 2 sparse layers of 4 experts, top 2; saved with one tensor per expert."""
    base = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Qwen3MoeConfig(**(base | changes))


CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {"llama": llama, "qwen3_moe": qwen3_moe}


def build(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with random weights of a size that keeps activations finite."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save(model: PreTrainedModel, directory: Path, *, max_shard_size: str = "50GB") -> Path:
    """The model as a safetensors checkpoint, as transformers writes it."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
