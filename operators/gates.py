"""The inner activation of an expert, recognised by the identity of the code that computes it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# gelu's three spellings in transformers differ only in rounding: erf, the tanh approximation, and the same by hand
_MODULES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "FastGELUActivation"): "gelu_tanh",
    ("transformers.activations", "AccurateGELUActivation"): "gelu_tanh",
}
_FUNCTIONS = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}

# Whose `_apply_gate` is min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1):
# defining module, class, whether gate and up alternate, and the attributes that hold alpha and limit.
_CLAMPED = (
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts", True, "alpha", "limit"),
    (
        *("transformers.models.openai_privacy_filter.modeling_openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
        *(False, "alpha", "limit"),
    ),
    (
        *("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl", "MiniMaxM3VLExperts"),
        *(False, "swiglu_alpha", "swiglu_limit"),
    ),
)


@dataclass(frozen=True)
class RecognisedGate:
    """`kind` as native.Gate names it; `interleaved` when gate and up rows alternate in the fused weight."""

    kind: str
    alpha: float = 1.702
    limit: float = 7.0
    interleaved: bool = False


def recognise_activation(activation: object) -> str | None:
    """The native name of an activation module or function; None when it is not one of the known ones.

    By exact type: a subclass may compute something else.
    """
    if isinstance(activation, nn.Module):
        kind = type(activation)
        if kind is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        return _MODULES.get((kind.__module__, kind.__qualname__))
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None


def recognise_gate(module: nn.Module) -> RecognisedGate | str:
    """How `module` joins gate and up, or one sentence on why that is not known. Computes nothing."""
    from transformers.integrations.moe import _default_apply_gate

    own = type(module).__name__
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or "_apply_gate" in vars(module):
        return f"{own} has no `_apply_gate` of its class"
    if gate is _default_apply_gate:
        activation = getattr(module, "act_fn", None)
        kind = recognise_activation(activation)
        if kind is None:
            name = getattr(activation, "__name__", type(activation).__name__)
            return f"{own} uses the activation {name}; known are silu, gelu, gelu_tanh, relu"
        if not module.is_concatenated:
            return f"{own} interleaves gate and up, which the default gate does not take apart"
        return RecognisedGate(kind)
    for path, name, interleaved, alpha, limit in _CLAMPED:
        defining = getattr(sys.modules.get(path), name, None)
        if defining is not None and vars(defining).get("_apply_gate") is gate:
            values = [getattr(module, alpha, None), getattr(module, limit, None)]
            if not all(isinstance(value, (int, float)) for value in values):
                return f"{own} has no numbers in {alpha} and {limit}"
            if interleaved == bool(module.is_concatenated):
                return f"{own} says is_concatenated={module.is_concatenated}, its gate says otherwise"
            return RecognisedGate("clamped_swiglu", float(values[0]), float(values[1]), interleaved)
    return f"{own} joins gate and up in an `_apply_gate` of its own that is not known"
