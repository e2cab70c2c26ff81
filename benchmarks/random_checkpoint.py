"""Checkpoints of random weights with real layer shapes, as the hub keeps them: config.json and safetensors shards.

Shapes and tensor names are those of the published checkpoints: Qwen/Qwen3-30B-A3B, meta-llama/Llama-3.2-1B,
mistralai/Mixtral-8x7B-v0.1 and a bf16 gpt-oss-20b. Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bf16 import normal

Tensor = tuple[str, tuple[int, ...]]
BYTES_PER_WEIGHT = 2  # bf16


@dataclass(frozen=True)
class Shape:
    """The sizes of one checkpoint; `topk` of `experts` are chosen per token (0 experts: a dense model)."""

    layers: int
    hidden: int
    intermediate: int  # of a dense MLP
    moe_intermediate: int  # of one expert
    experts: int
    topk: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def problems(self) -> list[str]:
        """Every size that no model can have, in words; empty when all is well."""
        found = [
            f"--{name.replace('_', '-')} is {value}: expected at least {least}"
            for name, value in vars(self).items()
            if value < (least := 0 if name in ("experts", "topk", "moe_intermediate") else 1)
        ]
        if self.topk > self.experts:
            found.append(f"--topk is {self.topk}: expected at most --experts ({self.experts})")
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            found.append(f"--heads is {self.heads}: expected a multiple of --kv-heads ({self.kv_heads})")
        if self.head_dim % 2:
            found.append(f"--head-dim is {self.head_dim}: expected an even number (rotary embedding turns pairs)")
        return found


def attention(prefix: str, shape: Shape, *, bias: bool = False) -> Iterator[Tensor]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, rows, columns in (
        ("q_proj", queries, shape.hidden),
        ("k_proj", keys, shape.hidden),
        ("v_proj", keys, shape.hidden),
        ("o_proj", shape.hidden, queries),
    ):
        yield f"{prefix}.self_attn.{name}.weight", (rows, columns)
        if bias:
            yield f"{prefix}.self_attn.{name}.bias", (rows,)


def decoder(shape: Shape, layer: Callable[[str, Shape], Iterator[Tensor]]) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        yield from layer(prefix, shape)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def llama_layer(prefix: str, shape: Shape) -> Iterator[Tensor]:
    yield from attention(prefix, shape)
    yield f"{prefix}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
    yield f"{prefix}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
    yield f"{prefix}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)


def qwen3_moe_layer(prefix: str, shape: Shape) -> Iterator[Tensor]:
    yield from attention(prefix, shape)
    yield f"{prefix}.self_attn.q_norm.weight", (shape.head_dim,)
    yield f"{prefix}.self_attn.k_norm.weight", (shape.head_dim,)
    yield f"{prefix}.mlp.gate.weight", (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (shape.moe_intermediate, shape.hidden)
        yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (shape.moe_intermediate, shape.hidden)
        yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (shape.hidden, shape.moe_intermediate)


def mixtral_layer(prefix: str, shape: Shape) -> Iterator[Tensor]:
    yield from attention(prefix, shape)
    yield f"{prefix}.block_sparse_moe.gate.weight", (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        of_expert = f"{prefix}.block_sparse_moe.experts.{expert}"
        yield f"{of_expert}.w1.weight", (shape.moe_intermediate, shape.hidden)
        yield f"{of_expert}.w2.weight", (shape.hidden, shape.moe_intermediate)
        yield f"{of_expert}.w3.weight", (shape.moe_intermediate, shape.hidden)


def gpt_oss_layer(prefix: str, shape: Shape) -> Iterator[Tensor]:
    yield from attention(prefix, shape, bias=True)
    yield f"{prefix}.self_attn.sinks", (shape.heads,)
    yield f"{prefix}.mlp.router.weight", (shape.experts, shape.hidden)
    yield f"{prefix}.mlp.router.bias", (shape.experts,)
    yield f"{prefix}.mlp.experts.gate_up_proj", (shape.experts, shape.hidden, 2 * shape.moe_intermediate)
    yield f"{prefix}.mlp.experts.gate_up_proj_bias", (shape.experts, 2 * shape.moe_intermediate)
    yield f"{prefix}.mlp.experts.down_proj", (shape.experts, shape.moe_intermediate, shape.hidden)
    yield f"{prefix}.mlp.experts.down_proj_bias", (shape.experts, shape.hidden)


def common_config(shape: Shape) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def llama_config(shape: Shape) -> dict[str, Any]:
    return {"attention_bias": False, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}


def qwen3_moe_config(shape: Shape) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 40960,
        "max_window_layers": shape.layers,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.moe_intermediate,
        "norm_topk_prob": True,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.topk,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def mixtral_config(shape: Shape) -> dict[str, Any]:
    return {
        "intermediate_size": shape.moe_intermediate,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": shape.topk,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    }


def gpt_oss_config(shape: Shape) -> dict[str, Any]:
    return {
        "attention_bias": True,
        "intermediate_size": shape.moe_intermediate,
        "layer_types": ["full_attention" if index % 2 else "sliding_attention" for index in range(shape.layers)],
        "max_position_embeddings": 131072,
        "num_experts_per_tok": shape.topk,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    }


@dataclass(frozen=True)
class Architecture:
    """One family: the published model's sizes, its config and the names and shapes of one layer's tensors."""

    class_name: str
    shape: Shape
    layer: Callable[[str, Shape], Iterator[Tensor]] = field(repr=False)
    config: Callable[[Shape], dict[str, Any]] = field(repr=False)


ARCHITECTURES: dict[str, Architecture] = {
    "gpt_oss": Architecture(
        "GptOssForCausalLM", Shape(24, 2880, 2880, 2880, 32, 4, 64, 8, 64, 201088), gpt_oss_layer, gpt_oss_config
    ),
    "llama": Architecture(
        "LlamaForCausalLM", Shape(16, 2048, 8192, 0, 0, 0, 32, 8, 64, 128256), llama_layer, llama_config
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM", Shape(32, 4096, 14336, 14336, 8, 2, 32, 8, 128, 32000), mixtral_layer, mixtral_config
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", Shape(48, 2048, 6144, 768, 128, 8, 32, 4, 128, 151936), qwen3_moe_layer, qwen3_moe_config
    ),
}


def tensors(arch: str, shape: Shape) -> list[Tensor]:
    """Names and shapes of every tensor, in the order of the layers."""
    return list(decoder(shape, ARCHITECTURES[arch].layer))


def tensor_bytes(dimensions: Sequence[int]) -> int:
    return int(np.prod(dimensions, dtype=np.int64)) * BYTES_PER_WEIGHT


def checkpoint_bytes(arch: str, shape: Shape) -> int:
    return sum(tensor_bytes(dimensions) for _, dimensions in tensors(arch, shape))


def shards(listed: Sequence[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Consecutive tensors in shards of at most `shard_bytes`; a larger tensor has a shard of its own."""
    parts: list[list[Tensor]] = []
    filled = shard_bytes
    for name, dimensions in listed:
        size = tensor_bytes(dimensions)
        if filled + size > shard_bytes or not parts:
            parts.append([])
            filled = 0
        parts[-1].append((name, dimensions))
        filled += size
    return parts


class RandomBytes:
    """Bytes of bf16 normal weights, cheap: one random block, read from an offset that differs from tensor to tensor.

    A generator makes some 0.1 GB/s on one core and a 12 GiB checkpoint would take minutes; nobody who loads, packs or
    multiplies the weights can tell that tensors share a block.
    """

    def __init__(self, *, seed: int, std: float = 0.02, weights: int = 1 << 22) -> None:
        self._block = memoryview(normal(weights, std=std, seed=seed).tobytes())
        self._position = 0
        self._ones = memoryview(np.full(4096, 0x3F80, dtype="<u2").tobytes())

    def random(self, size: int) -> Iterator[memoryview]:
        # An odd stride of cache lines visits every offset before one repeats.
        self._position = (self._position + 64 * 10007) % len(self._block)
        yield from self._tiles(self._block, self._position, size)

    def ones(self, size: int) -> Iterator[memoryview]:
        yield from self._tiles(self._ones, 0, size)

    @staticmethod
    def _tiles(block: memoryview, start: int, size: int) -> Iterator[memoryview]:
        while size:
            piece = block[start : start + size]
            yield piece
            size -= len(piece)
            start = 0


def write_shard(path: Path, listed: Sequence[Tensor], source: RandomBytes) -> int:
    """One safetensors file (8 bytes of header length, JSON header, data); returns its data bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dimensions in listed:
        begin, end = end, end + tensor_bytes(dimensions)
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, dimensions in listed:
            size = tensor_bytes(dimensions)
            for piece in source.ones(size) if "norm" in name else source.random(size):
                write_all(file, piece)
    return end


def write_all(file: Any, data: memoryview) -> None:
    """An unbuffered write may be short (2 GiB a call, a nearly full disk)."""
    while data:
        data = data[file.write(data) :]


def write_checkpoint(
    out: Path,
    *,
    arch: str,
    shape: Shape,
    shard_bytes: int = 4 << 30,
    seed: int = 0,
    on_shard: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes config.json, generation_config.json, the shards and their index into `out`, and says what it wrote.

    Raises ValueError for sizes no model can have, FileExistsError when `out` holds files and OSError (ENOSPC in words)
    when the disk has no room, each before anything is written.
    """
    if problems := shape.problems():
        raise ValueError("; ".join(problems))
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder, or remove what is in it")
    listed = tensors(arch, shape)
    total = sum(tensor_bytes(dimensions) for _, dimensions in listed)
    place = out if out.exists() else out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if total > free:
        raise OSError(f"the checkpoint takes {total / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB free")
    out.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    source = RandomBytes(seed=seed)
    parts = shards(listed, shard_bytes)
    weight_map: dict[str, str] = {}
    for index, part in enumerate(parts, start=1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        written = write_shard(out / name, part, source)
        weight_map.update({tensor: name for tensor, _ in part})
        if on_shard:
            on_shard(index, written)
    if len(parts) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
    architecture = ARCHITECTURES[arch]
    config = {
        "architectures": [architecture.class_name],
        "model_type": arch,
        **common_config(shape),
        **architecture.config(shape),
    }
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    seconds = time.perf_counter() - started
    return {
        "path": str(out),
        "arch": arch,
        "layers": shape.layers,
        "parameters": total // BYTES_PER_WEIGHT,
        "source_gib": total / 2**30,
        "files": len(parts),
        "largest_tensor_gib": max(tensor_bytes(dimensions) for _, dimensions in listed) / 2**30,
        "seconds": seconds,
        "gb_per_s": total / 1e9 / seconds,
    }
