"""Does a module keep the shared expert contract of transformers 5, `experts(hidden_states, top_k_index, top_k_weights)`?"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from numagraft.contract import Rejected
from numagraft.operators.gates import RecognisedGate, recognise_gate
from numagraft.operators.packed import check_parameters, plain_module


@dataclass(frozen=True)
class ExpertShape:
    """What the packer must know: counts, the layout of the fused weights, and the gate."""

    experts: int
    hidden: int
    intermediate: int
    transposed: bool  # [E, in, out] instead of [E, out, in]
    has_bias: bool
    gate: RecognisedGate


@cache
def _contract_forward() -> CodeType:
    """The code object of every forward that transformers' decorator made."""
    from transformers.integrations.moe import use_experts_implementation

    class Probe(nn.Module):
        def forward(self):
            pass

    return use_experts_implementation(Probe).forward.__code__


def expert_shape(module: nn.Module) -> ExpertShape | Rejected:
    """The module's shape, or why it does not keep the contract; names the class and the cause. Computes nothing."""
    own = type(module).__name__
    forward = getattr(type(module), "forward", None)
    if getattr(forward, "__code__", None) is not _contract_forward():
        return Rejected(_foreign_forward(own, forward))
    if not getattr(module, "has_gate", True):
        return Rejected(f"{own} has no gate: up and down projections only")
    if getattr(module, "has_post_expert_norm", False):
        return Rejected(f"{own} applies a norm after each expert")
    if getattr(module, "_is_expert_parallel", False):
        return Rejected(f"{own} holds only a part of the experts (expert parallelism)")
    if problem := plain_module(module):
        return problem
    has_bias = bool(module.has_bias)
    names = {"gate_up_proj": 3, "down_proj": 3} | ({"gate_up_proj_bias": 2, "down_proj_bias": 2} if has_bias else {})
    if problem := check_parameters(module, names):
        return Rejected(f"{own}: {problem.reason}")
    if extra := sorted(set(module._modules) - {"act_fn"}):
        return Rejected(f"{own} has a submodule {extra[0]} that the contract does not know")
    gate = recognise_gate(module)
    if isinstance(gate, str):
        return Rejected(gate)
    return _checked_shapes(module, gate)


def _checked_shapes(module: nn.Module, gate: RecognisedGate) -> ExpertShape | Rejected:
    transposed, has_bias = bool(module.is_transposed), bool(module.has_bias)
    fused, down = tuple(module.gate_up_proj.shape), tuple(module.down_proj.shape)
    experts, doubled, hidden = (fused[0], fused[2], fused[1]) if transposed else fused
    intermediate = doubled // 2
    expected: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (experts, hidden, 2 * intermediate) if transposed else (experts, 2 * intermediate, hidden),
        "down_proj": (experts, intermediate, hidden) if transposed else (experts, hidden, intermediate),
        "gate_up_proj_bias": (experts, 2 * intermediate),
        "down_proj_bias": (experts, hidden),
    }
    for name, shape in expected.items():
        found = module._parameters.get(name)
        if found is not None and tuple(found.shape) != shape:
            return Rejected(
                f"{type(module).__name__}: {name} has the shape {list(found.shape)}, expected {list(shape)} beside "
                f"gate_up_proj {list(fused)} and down_proj {list(down)}"
            )
    if getattr(module, "num_experts", experts) != experts:
        return Rejected(f"{type(module).__name__}: num_experts is {module.num_experts}, the weights hold {experts}")
    return ExpertShape(experts, hidden, intermediate, transposed, has_bias, gate)


def _foreign_forward(own: str, forward: Any) -> str:
    try:
        names = [name for name in inspect.signature(forward).parameters if name != "self"]
    except (TypeError, ValueError):
        names = []
    if names == ["hidden_states", "top_k_index", "top_k_weights"]:
        return f"{own} has a forward of its own that transformers does not mark as the shared expert contract"
    return f"{own}.forward({', '.join(names)}) is not the shared expert contract (hidden_states, top_k_index, top_k_weights)"
