"""Small expert modules with weights, and routings for them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """Weights such that hidden activations keep the size of their inputs; eager forward."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5))
    module.config._experts_implementation = "eager"
    return module.requires_grad_(False)


def qwen(experts: int = 6, hidden: int = 64, intermediate: int = 96, top_k: int = 2) -> Qwen3MoeExperts:
    sizes = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": intermediate}
    return filled(Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts_per_tok=top_k)))


def gpt_oss(experts: int = 6, hidden: int = 64, intermediate: int = 96) -> GptOssExperts:
    sizes = {"num_local_experts": experts, "hidden_size": hidden, "intermediate_size": intermediate}
    return filled(GptOssExperts(GptOssConfig(**sizes)))


def routed(tokens: int, experts: int, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per token and weights that sum to one."""
    scores = torch.randn(tokens, experts)
    weights, index = scores.softmax(-1).topk(top_k, -1)
    return index, weights / weights.sum(-1, keepdim=True)
