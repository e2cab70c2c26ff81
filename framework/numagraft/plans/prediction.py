"""Predicted tokens per second of a plan, with the policies side by side. A model of nodes and bandwidths, not a measurement.

Decoding reads every packed weight that a token needs once: its time is that of the slowest node plus one fork-join per
operator call. Prefill multiplies: its time is that of the arithmetic. Neither counts attention over the cache, routing or
sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numagraft.planning import Plan

if TYPE_CHECKING:
    from numagraft.platform import Platform

#: int8 multiply-adds per second and core, in units of 1e12 operations (two per multiply-add), by kernel row: measured in
#: registers on one core of a recent Xeon for amx and avx512_vnni, scaled by vector width and ports for the others
CORE_TOPS = {"amx": 6.7, "avx512_vnni": 0.88, "avx512": 0.45, "avx2": 0.23, "scalar": 0.01}
#: the share of the arithmetic peak that prefill reaches
PREFILL_EFFICIENCY = 0.2
#: seconds of one fork-join on one node, and more for every further node
FORK_JOIN_S, FORK_JOIN_PER_NODE_S = 5e-6, 3e-6
#: what one core reads from memory, where nothing is known of the machine's channels
CORE_BYTES_PER_S = 15e9
#: the largest guess for one node without any knowledge
NODE_BYTES_PER_S = 100e9
#: remote memory against local memory
REMOTE_SHARE = 0.5

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


def predict(plan: Plan, platform: Platform) -> Predictions | None:
    """None where the plan packs nothing, or its layout has no threads."""
    compute = plan.layout.compute_nodes
    if not plan.bytes_per_token or not compute:
        return None
    bandwidth, source = _bandwidths(plan, platform)
    calls = sum(module.placement is not None for module in plan.modules)
    total = plan.bytes_per_token
    tops = {node: plan.layout.nodes[node].threads * CORE_TOPS.get(platform.isa[0], 0.01) for node in compute}
    # the packed bytes stand for the weights; two operations each
    bytes_per_weight = _bytes_per_weight(plan)
    operations = 2 * total / bytes_per_weight

    def decode(policy: str) -> float:
        nodes = compute[:1] if policy == "one node" else compute
        sync = calls * (FORK_JOIN_S + FORK_JOIN_PER_NODE_S * (len(nodes) - 1))
        threads = sum(plan.layout.nodes[node].threads for node in nodes)
        slowest = 0.0
        for node in nodes:
            share = total * plan.layout.nodes[node].threads / threads
            speed = bandwidth[node]
            if policy == "interleave" and len(nodes) > 1:
                remote = (len(nodes) - 1) / len(nodes)
                speed *= 1 / ((1 - remote) + remote / REMOTE_SHARE)
            slowest = max(slowest, share / speed)
        return 1 / (slowest + sync)

    def prefill(policy: str) -> float:
        nodes = compute[:1] if policy == "one node" else compute
        return PREFILL_EFFICIENCY * sum(tops[node] for node in nodes) * 1e12 / operations

    copies = {"shard": 1.0, "mirror": float(len(compute)), "interleave": 1.0, "one node": 1.0}
    policies = POLICIES if len(compute) > 1 else ("one node",)
    table = tuple(Prediction(policy, decode(policy), prefill(policy), copies[policy]) for policy in policies)
    main = _main_policy(plan, total)
    own = next((each for each in table if each.policy == main), table[0])
    assumptions = (
        f"memory: {source}",
        f"arithmetic: {platform.isa[0]}, {CORE_TOPS.get(platform.isa[0], 0.01):g} T int8 operations/s per core, "
        f"{PREFILL_EFFICIENCY:.0%} of it in prefill",
        f"fork-join: {FORK_JOIN_S * 1e6:g} µs per operator call, {FORK_JOIN_PER_NODE_S * 1e6:g} µs more per further node",
        f"remote memory reads at {REMOTE_SHARE:.0%} of local memory",
        "attention over the cache, routing and sampling are not counted",
    )
    return Predictions(own, table, assumptions)


def _main_policy(plan: Plan, total: int) -> str:
    """The policy that most bytes per token are placed by."""
    amounts: dict[str, int] = {}
    for module in plan.modules:
        if module.placement is not None:
            amounts[module.placement.policy] = amounts.get(module.placement.policy, 0) + module.bytes_per_token
    policy = max(amounts, key=lambda key: amounts[key], default="bind")
    return "one node" if policy == "bind" else policy


def _bytes_per_weight(plan: Plan) -> float:
    sizes: Mapping[str, float] = {"bf16": 2.0, "int8": 1.0, "int4": 0.625}
    amount = weights = 0.0
    for module in plan.modules:
        size = sizes.get(getattr(module.params, "format", ""), 1.0)
        amount += module.bytes_per_token
        weights += module.bytes_per_token / size
    return amount / weights if weights else 1.0


def _measured(plan: Plan, platform: Platform) -> dict[int, float]:
    """Compute node -> bytes per second of its own memory, where this machine was measured."""
    from numagraft.doctor.measurement import Measurement

    measurement = Measurement.load(platform) if platform.live else None
    if measurement is None:
        return {}
    found = {}
    for index in plan.layout.compute_nodes:
        os_node = plan.layout.nodes[index].os_node
        speed = None if os_node is None else measurement.local_gb_per_s(os_node)
        if speed:
            found[index] = speed * 1e9
    return found


def _bandwidths(plan: Plan, platform: Platform) -> tuple[dict[int, float], str]:
    """Bytes per second of each compute node, and where the figure comes from."""
    compute = plan.layout.compute_nodes
    measured = _measured(plan, platform)
    if len(measured) == len(compute):
        return measured, "read bandwidth as `numagraft doctor` measured it here"
    known = {node.id: node.read_mb_per_s for node in platform.nodes}
    firmware = {
        index: known[os_node] * 1e6
        for index in compute
        if (os_node := plan.layout.nodes[index].os_node) in known and known[os_node]
    }
    if len(firmware) == len(compute):
        return firmware, "the firmware's read bandwidth per node (HMAT)"
    slots = [module for module in platform.memory_modules if module.bytes and module.mega_transfers]
    if slots:
        total = sum(module.mega_transfers * 8e6 for module in slots if module.mega_transfers)
        each = 0.8 * total / max(len(platform.usable_nodes), 1)
        text = f"80 % of {len(slots)} populated slots x 8 bytes x their transfer rate, taken as one channel each"
        return {index: each for index in compute}, text
    guess = {
        index: min(NODE_BYTES_PER_S, plan.layout.nodes[index].threads * CORE_BYTES_PER_S) for index in compute
    }
    text = f"unknown; {CORE_BYTES_PER_S / 1e9:g} GB/s per thread, at most {NODE_BYTES_PER_S / 1e9:g} per node, assumed"
    return guess, text
