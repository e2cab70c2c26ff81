"""Changes of a model that leave its function as it was: upcycling into experts, and rotation of its weights.

Upcycling gives a mixture of experts with known, exact logits. Rotation takes weights off a quantiser's grid: SmolLM2's
file already holds 4-bit values, which an int4 format would meet again exactly; an orthogonal matrix in between makes
them ordinary dense weights again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedModel


#: what a Llama's and a Mixtral's configuration have in common
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def upcycled(model: LlamaForCausalLM, *, experts: int = 4, topk: int = 2, seed: int = 0) -> MixtralForCausalLM:
    """A Mixtral with each MLP of `model` copied into `experts` experts behind a random router.

    Mixtral's weights of the chosen experts sum to one, so every token gets the original MLP's output to rounding.
    Everything but the experts shares memory with `model`.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    kept = model.config
    config = MixtralConfig(
        **{name: getattr(kept, name) for name in SHARED_SETTINGS},
        num_local_experts=experts,
        num_experts_per_tok=topk,
        sliding_window=None,
        dtype=model.dtype,
    )
    with torch.device("meta"):
        made = MixtralForCausalLM(config)
    made.model.rotary_emb = type(made.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(seed)
    state = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(model.model.layers):
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        router = torch.randn(experts, kept.hidden_size, generator=generator) * kept.hidden_size**-0.5
        prefix = f"model.layers.{index}.mlp"
        state[f"{prefix}.gate.weight"] = router.to(model.dtype)
        state[f"{prefix}.experts.gate_up_proj"] = gate_up.expand(experts, -1, -1).contiguous()
        state[f"{prefix}.experts.down_proj"] = layer.mlp.down_proj.weight.expand(experts, -1, -1).contiguous()
    made.load_state_dict(state, strict=True, assign=True)
    made.tie_weights()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made.eval()


Side = Literal["input", "output"]


def random_orthogonal(size: int, *, seed: int) -> torch.Tensor:
    """A [size, size] fp32 orthogonal matrix, uniform over all of them (QR of a Gaussian, R's signs made positive)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return q * torch.diagonal(r).sign()


class RotatedLinear(nn.Module):
    """y = W x with a rotated weight in `inner`, the rotation undone here.

    side "input": (W Q^T)(Q x), which also spreads each row's large weights and the inputs' outliers over all inputs; side
    "output": Q^T((Q W) x), which mixes the rows and leaves every input where it was.
    """

    def __init__(self, linear: nn.Linear, rotation: torch.Tensor, *, side: Side = "input") -> None:
        super().__init__()
        self.side = side
        self.inner = nn.Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )
        weight = linear.weight.float()
        turned = weight @ rotation.T if side == "input" else rotation @ weight
        self.inner.weight = nn.Parameter(turned.to(linear.weight.dtype), requires_grad=False)
        bias = linear.bias
        if bias is not None and side == "output":
            bias = nn.Parameter((rotation @ bias.float()).to(bias.dtype), requires_grad=False)
        self.inner.bias = bias
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.side == "input":
            return self.inner((x.float() @ self.rotation.T).to(x.dtype))
        return (self.inner(x).float() @ self.rotation).to(x.dtype)


class RotatedExperts(nn.Module):
    """Fused experts with the input side of gate and up turned, and the output side of down; both undone here.

    The input of `down` is made inside the experts and cannot be turned from outside; mixing its rows takes it off the
    grid as well.
    """

    def __init__(self, experts: nn.Module, rotation: torch.Tensor) -> None:
        super().__init__()
        dtype = experts.gate_up_proj.dtype
        experts.gate_up_proj = nn.Parameter((experts.gate_up_proj.float() @ rotation.T).to(dtype), requires_grad=False)
        experts.down_proj = nn.Parameter((rotation @ experts.down_proj.float()).to(dtype), requires_grad=False)
        self.inner = experts
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        turned = (x.float() @ self.rotation.T).to(x.dtype)
        return (self.inner(turned, index, weights).float() @ self.rotation).to(x.dtype)


def rotate(model: PreTrainedModel, *, lm_head: bool = False, side: Side = "input", seed: int = 1) -> None:
    """Wraps every linear layer and every fused experts module of `model` in place; `lm_head` only when asked.

    `side` is that of the linear layers (RotatedLinear); experts have one way only.
    One orthogonal matrix per size. A tied `lm_head` is untied: its rotated copy is another tensor.
    """
    rotations: dict[int, torch.Tensor] = {}

    def of_size(size: int) -> torch.Tensor:
        if size not in rotations:
            rotations[size] = random_orthogonal(size, seed=seed + size)
        return rotations[size]

    for name, module in list(model.named_modules()):
        wrapped: nn.Module
        if type(module) is nn.Linear and (lm_head or name != "lm_head"):
            # lm_head's output is the vocabulary: an orthogonal matrix of that size is out of reach
            turned_side: Side = "input" if name == "lm_head" else side
            size = module.in_features if turned_side == "input" else module.out_features
            wrapped = RotatedLinear(module, of_size(size), side=turned_side)
        elif (
            hasattr(module, "gate_up_proj")
            and hasattr(module, "down_proj")
            and isinstance(module.gate_up_proj, nn.Parameter)
        ):
            wrapped = RotatedExperts(module, of_size(module.gate_up_proj.shape[-1]))
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapped)
    if lm_head:
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
