"""Grafts one module by hand: placements on virtual nodes, loading, and what the weights became."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from numagraft import native
from numagraft.operators.experts import Experts
from numagraft.operators.linear import Linear
from numagraft.operators.native_bridge import matrix
from numagraft.operators.params import PackedParams
from numagraft.placement import Part, Placement
from numagraft.runtime import RuntimeLayout

# relative Frobenius error against fp32 with the same dequantised weights
LINEAR_BARS = {"bf16": 4e-3, "int8": 1.2e-2, "int4": 1.2e-2, "fp8": 4e-3, "mxfp4": 1.2e-2}
EXPERTS_BARS = {"bf16": 4e-3, "int8": 2.0e-2, "int4": 2.0e-2, "fp8": 5e-3, "mxfp4": 2.0e-2}


@cache
def runtime(nodes: int = 1, threads_per_node: int = 1) -> native.Runtime:
    return native.Runtime(RuntimeLayout.virtual(nodes, threads_per_node=threads_per_node))


def place(policy: str, nodes: int, count: int, multiple: int) -> Placement:
    """`count` units by `policy` over `nodes` virtual nodes."""
    everywhere = tuple(range(nodes))
    if policy == "bind":
        return Placement("bind", (Part((nodes - 1,), False, (nodes - 1,), 0, count),))
    if policy == "interleave":
        return Placement("interleave", (Part(everywhere, True, everywhere, 0, count),))
    if policy == "mirror":
        return Placement("mirror", tuple(Part((node,), False, (node,), 0, count) for node in everywhere))
    steps = -(-count // multiple)
    bounds = [min(count, steps * node // nodes * multiple) for node in range(nodes + 1)]
    parts = [Part((n,), False, (n,), bounds[n], bounds[n + 1]) for n in everywhere if bounds[n] < bounds[n + 1]]
    return Placement("shard", tuple(parts))


def skeleton(module: nn.Module, *, operator, params: PackedParams, policy: str = "bind", nodes: int = 1, name: str = "m"):
    """The operator before any weight arrived."""
    units = operator.units(module, params)
    placement = place(policy, nodes, units.count, units.multiple)
    return operator.from_module(
        module, params, name=name, placement=placement, runtime=runtime(nodes), device="cpu"
    )


def graft(module: nn.Module, *, operator=Linear, policy: str = "bind", nodes: int = 1, **kwargs):
    """The operator with the module's own weights, ready to compute."""
    grafted = skeleton(module, operator=operator, params=PackedParams(**kwargs), policy=policy, nodes=nodes)
    for name, parameter in module.named_parameters():
        grafted.load(name, parameter)
    grafted.finish()
    return grafted


def replicas(grafted) -> int:
    """How many copies of every unit there are."""
    first = grafted.placement.parts[0]
    return sum((part.begin, part.end) == (first.begin, first.end) for part in grafted.placement.parts)


def unpacked_linear(grafted: Linear) -> torch.Tensor:
    """The values that the packed weight stands for; replicas must agree."""
    copies = []
    for replica in range(replicas(grafted)):
        copies.append(torch.full((grafted.out_features, grafted.in_features), torch.nan))
        grafted.weights.unpack(matrix(copies[-1]), replica=replica)
    assert all(torch.equal(copies[0], copy) for copy in copies)
    return copies[0]


@torch.no_grad()
def with_unpacked_experts(module: nn.Module, grafted: Experts) -> nn.Module:
    """`module` (fp32, changed in place) with the values that the packed weights stand for."""
    shape = grafted.shape
    wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    for expert in range(shape.experts):
        gate = _unpacked(grafted, "unpack_gate", expert, wide)
        up = _unpacked(grafted, "unpack_up", expert, wide)
        down = _unpacked(grafted, "unpack_down", expert, tall)
        fused = torch.stack([gate, up], 1).flatten(0, 1) if shape.gate.interleaved else torch.cat([gate, up])
        module.gate_up_proj[expert] = fused.T if shape.transposed else fused
        module.down_proj[expert] = down.T if shape.transposed else down
    return module


def _unpacked(grafted: Experts, method: str, expert: int, shape: tuple[int, int]) -> torch.Tensor:
    copies = [torch.full(shape, torch.nan) for _ in range(replicas(grafted))]
    for replica, copy in enumerate(copies):
        getattr(grafted.weights, method)(expert, matrix(copy), replica=replica)
    assert all(torch.equal(copies[0], copy) for copy in copies)
    return copies[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
