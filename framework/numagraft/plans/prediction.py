"""Predicted tokens per second of a plan, with the policies side by side. A model of nodes and bandwidths, not a measurement.

Decoding reads every packed weight that a token needs once: its time is that of the slowest node plus one fork-join per
operator call. Prefill multiplies: its time is that of the arithmetic, and of adding up what shards of experts computed.
Neither counts attention over the cache, routing or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numagraft.planning import Plan
from numagraft.plans.mirroring import MirrorGains
from numagraft.plans.rates import Load, Rates

if TYPE_CHECKING:
    from numagraft.platform import Platform

POLICIES = ("shard", "mirror", "interleave", "one node")


@dataclass(frozen=True)
class Prediction:
    """Tokens per second for one request, by policy; `memory` is how often the packed weights are held."""

    policy: str
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    memory: float


@dataclass(frozen=True)
class Predictions:
    """Every policy for all placed modules, and what was assumed."""

    of_plan: Prediction
    alternatives: tuple[Prediction, ...]
    assumptions: tuple[str, ...]
    mirror: MirrorGains | None = None  # None with one node


def predict(plan: Plan, platform: Platform) -> Predictions | None:
    """None where the plan packs nothing, or its layout has no threads."""
    compute = plan.layout.compute_nodes
    if not plan.bytes_per_token or not compute:
        return None
    rates, load = Rates.of(plan.layout, platform), Load.of(plan.modules)

    def decode(policy: str) -> float:
        nodes = compute[:1] if policy == "one node" else compute
        return 1 / rates.decode_seconds(load, nodes, interleaved=policy == "interleave")

    def prefill(policy: str) -> float:
        nodes = compute[:1] if policy == "one node" else compute
        return 1 / rates.prefill_seconds(load, nodes, adds_shards=policy == "shard")

    copies = {"shard": 1.0, "mirror": float(len(compute)), "interleave": 1.0, "one node": 1.0}
    policies = POLICIES if len(compute) > 1 else ("one node",)
    table = tuple(Prediction(policy, decode(policy), prefill(policy), copies[policy]) for policy in policies)
    main = _main_policy(plan)
    own = next((each for each in table if each.policy == main), table[0])
    gains = MirrorGains.of(rates, load) if len(compute) > 1 else None
    return Predictions(own, table, rates.assumptions(), gains)


def _main_policy(plan: Plan) -> str:
    """The policy that most bytes per token are placed by."""
    amounts: dict[str, int] = {}
    for module in plan.modules:
        if module.placement is not None:
            amounts[module.placement.policy] = amounts.get(module.placement.policy, 0) + module.bytes_per_token
    policy = max(amounts, key=lambda key: amounts[key], default="bind")
    return "one node" if policy == "bind" else policy
