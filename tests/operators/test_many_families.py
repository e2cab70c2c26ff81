"""Operators inside the decoders of many families: nobody's forward may notice that its children were replaced.

What a family does not get along with must be kept with its reason, never computed wrongly.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numagraft import optimize
from numagraft.runtime import RuntimeLayout

# sizes under all the names that families use; every token chooses every expert, so that no rounding changes a routing
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 96),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 144),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 80),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "index_topk"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step", "bos_token_id"), 1),
    **dict.fromkeys(("qk_nope_head_dim", "index_head_dim", "mamba_d_state", "state_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "eos_token_id"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "vocab_size": 131, "pad_token_id": 0, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 24,
    "rotary_dim": 8, "linear_num_value_heads": 4, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
# layers, key-value heads and head size: what the families' own arithmetic asks for
TWO_LAYERS = {**dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2), "num_key_value_heads": 2, "head_dim": 24}
FOUR_LAYERS = {**dict.fromkeys(TWO_LAYERS, 4), "head_dim": 8}
FAMILIES = {
    **dict.fromkeys(
        ["afmoe", "apertus", "arcee", "aria_text", "biogpt", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "ernie4_5_moe", "exaone4", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neo", "gpt_neox", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jetmoe", "laguna", "lfm2", "llama", "llama4_text", "mamba", "mimo_v2_flash", "minimax", "minimax_m2", "mistral", "mpt", "nemotron", "nemotron_h", "olmo2", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "xglm"],
        TWO_LAYERS,
    ),
    **dict.fromkeys(
        ["cohere2_moe", "deepseek_v32", "deepseek_v4", "exaone_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "inkling_text", "longcat_flash", "minimax_m3_vl_text", "olmo3", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma"],
        FOUR_LAYERS,
    ),
}
PACKED = {
    "schema": 1,
    "rules": [
        {
            "id": role,
            "match": {"role": role},
            "replace": {"class": "experts" if role == "experts" else "linear", "kwargs": {"format": "bf16"}},
            "on_unavailable": "keep",
            "optional": True,
        }
        for role in ("experts", "linear", "lm_head")
    ],
}
LAYERS = {"schema": 1, "rules": [{"id": "layers", "match": {"role": "decoder_layer"}, "replace": {"class": "torch", "device": "cpu"}}]}
# what is kept, and why; families that are not named keep nothing
KEPT = {
    "bloom": {"BloomAttention.forward computes with dense's", "BloomMLP.forward computes with dense_4h_to_h's"},
    "deepseek_v4": {"DeepseekV4GroupedLinear is an nn.Linear with a forward", "DeepseekV4Experts joins gate and up"},
    "falcon_h1": {"computes with out_proj's"},
    "falcon_mamba": {"computes with x_proj's", "computes with dt_proj's", "computes with out_proj's"},
    "jetmoe": {"JetMoeParallelExperts.forward(inputs, expert_size) is not"},
    "llama4_text": {"Llama4TextExperts.forward(hidden_states) is not"},
    "longcat_flash": {"LongcatFlashExperts has a forward of its own"},
    "mamba": {"computes with x_proj's", "computes with dt_proj's", "computes with out_proj's"},
    "nemotron_h": {"computes with out_proj's", "NemotronHExperts has no gate"},
}


def small_model(family: str) -> torch.nn.Module:
    default = AutoConfig.for_model(family)
    sizes = {name: size for name, size in (SIZES | FAMILIES[family]).items() if hasattr(default, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # values that bf16 holds exactly: only arithmetic differs then
            if parameter.dim() > 1:
                parameter.copy_(parameter.bfloat16())
    # as `optimize` leaves them: matmul folds its batch only for weights that could be trained, and on some CPUs
    # (Zen 3) the two products differ in the last bit
    return model.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_children(family):
    model = small_model(family)
    tokens = torch.tensor([[1, 5, 9, 30, 77, 3, 128]])
    with torch.no_grad():
        expected = model(tokens).logits
        grafted = optimize(model, PACKED, runtime=RuntimeLayout.virtual(2))
        found = grafted(tokens).logits
    assert ((found - expected).norm() / expected.norm()).item() <= 0.02
    assert any(module.operator == "linear" for module in grafted.numagraft_plan.modules)
    fallbacks = grafted.numagraft_plan.fallbacks
    reasons = KEPT.get(family, set())
    for reason in reasons:
        assert any(reason in fallback for fallback in fallbacks), fallbacks
    assert all(any(reason in fallback for reason in reasons) for fallback in fallbacks), fallbacks


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_computed_by_the_torch_operator(family):
    model = small_model(family)
    tokens = torch.tensor([[1, 5, 9, 30, 77, 3, 128]])
    with torch.no_grad():
        expected = model(tokens).logits
        found = optimize(model, LAYERS)(tokens).logits
    assert torch.equal(found, expected)
