"""How fast a machine's nodes read and multiply, and what one token asks of them: the figures behind predictions. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numagraft.runtime import RuntimeLayout

if TYPE_CHECKING:
    from numagraft.planning import PlannedModule
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

_WEIGHT_BYTES: Mapping[str, float] = {"bf16": 2.0, "int8": 1.0, "int4": 0.625}


@dataclass(frozen=True)
class Load:
    """What one token costs in packed weights: bytes read, operations (two per weight), operator calls, and float32 values
    that shards on several nodes add up."""

    bytes: int
    operations: float
    calls: int
    added_values: int = 0
    packed_bytes: int = 0  # of all packed weights, once

    @classmethod
    def of(cls, modules: Iterable[PlannedModule]) -> Load:
        placed = [module for module in modules if module.placement is not None]
        weights = sum(
            module.bytes_per_token / _WEIGHT_BYTES.get(getattr(module.params, "format", ""), 1.0) for module in placed
        )
        return cls(
            sum(module.bytes_per_token for module in placed),
            2 * weights,
            len(placed),
            sum(module.added_per_token for module in placed),
            sum(
                sum(module.node_bytes.values()) // module.placement.replicas
                for module in placed
                if module.placement is not None
            ),
        )


@dataclass(frozen=True)
class Rates:
    """Of the compute nodes of a layout, by runtime node: bytes per second of their own memory, operations per second in
    prefill, threads; `source` says where the bandwidths come from."""

    bandwidth: Mapping[int, float]
    operations: Mapping[int, float]
    threads: Mapping[int, int]
    source: str
    isa: str
    remote_share: float = REMOTE_SHARE  # of local bandwidth

    @classmethod
    def of(cls, layout: RuntimeLayout, platform: Platform) -> Rates:
        bandwidth, source = _bandwidths(layout, platform)
        remote = _measured_remote_share(layout, platform) or REMOTE_SHARE
        core = CORE_TOPS.get(platform.isa[0], 0.01) * 1e12 * PREFILL_EFFICIENCY
        threads = {node: layout.nodes[node].threads for node in layout.compute_nodes}
        operations = {node: count * core for node, count in threads.items()}
        return cls(bandwidth, operations, threads, source, platform.isa[0], remote)

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(self.threads)

    def decode_seconds(self, load: Load, nodes: Sequence[int], *, interleaved: bool = False) -> float:
        """One token computed by `nodes` together, each reading its share: the slowest, and a fork-join per call."""
        threads = sum(self.threads[node] for node in nodes)
        slowest = max(load.bytes * self.threads[node] / threads / self.bandwidth[node] for node in nodes)
        if interleaved and len(nodes) > 1:
            remote = (len(nodes) - 1) / len(nodes)
            slowest *= (1 - remote) + remote / self.remote_share
        return slowest + load.calls * (FORK_JOIN_S + FORK_JOIN_PER_NODE_S * (len(nodes) - 1))

    def prefill_seconds(self, load: Load, nodes: Sequence[int], *, adds_shards: bool = False) -> float:
        """One token of a long prompt. Shards of experts write a float32 sum each, and read one of every node to add them."""
        seconds = load.operations / sum(self.operations[node] for node in nodes)
        count = len(nodes)
        if adds_shards and count > 1:
            moved = 1 + 1 / count + (count - 1) / count / self.remote_share
            seconds += max(4 * load.added_values * moved / self.bandwidth[node] for node in nodes)
        return seconds

    def assumptions(self) -> tuple[str, ...]:
        return (
            f"memory: {self.source}",
            f"arithmetic: {self.isa}, {CORE_TOPS.get(self.isa, 0.01):g} T int8 operations/s per core, "
            f"{PREFILL_EFFICIENCY:.0%} of it in prefill",
            f"fork-join: {FORK_JOIN_S * 1e6:g} µs per operator call, {FORK_JOIN_PER_NODE_S * 1e6:g} µs more per further node",
            f"remote memory reads at {self.remote_share:.0%} of local memory",
            "not counted: attention over the cache, routing, sampling, and what Python and torch do around operator calls: "
            "0.1 to 0.2 ms each when decoding, most of a small dense model's time",
        )


def _measured(layout: RuntimeLayout, platform: Platform) -> dict[int, float]:
    """Compute node -> bytes per second of its own memory, where this machine was measured."""
    from numagraft.doctor.measurement import Measurement

    measurement = Measurement.load(platform) if platform.live else None
    if measurement is None:
        return {}
    found = {}
    for index in layout.compute_nodes:
        os_node = layout.nodes[index].os_node
        speed = None if os_node is None else measurement.local_gb_per_s(os_node)
        if speed:
            found[index] = speed * 1e9
    return found


def _measured_remote_share(layout: RuntimeLayout, platform: Platform) -> float | None:
    """The mean over pairs of nodes, where this machine was measured."""
    from numagraft.doctor.measurement import Measurement

    measurement = Measurement.load(platform) if platform.live else None
    if measurement is None:
        return None
    chosen = {layout.nodes[index].os_node for index in layout.compute_nodes}
    shares = []
    for node, row in zip(measurement.compute_nodes, measurement.read_gb_per_s, strict=True):
        local = measurement.local_gb_per_s(node)
        if node in chosen and local:
            pairs = zip(measurement.memory_nodes, row, strict=True)
            shares += [rate / local for other, rate in pairs if other != node and other in chosen]
    return sum(shares) / len(shares) if shares else None


def _bandwidths(layout: RuntimeLayout, platform: Platform) -> tuple[dict[int, float], str]:
    """Bytes per second of each compute node, and where the figure comes from."""
    compute = layout.compute_nodes
    measured = _measured(layout, platform)
    if len(measured) == len(compute):
        return measured, "read bandwidth as `numagraft doctor` measured it here"
    known = {node.id: node.read_mb_per_s for node in platform.nodes}
    firmware = {
        index: known[os_node] * 1e6
        for index in compute
        if (os_node := layout.nodes[index].os_node) in known and known[os_node]
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
        index: min(NODE_BYTES_PER_S, layout.nodes[index].threads * CORE_BYTES_PER_S) for index in compute
    }
    text = f"unknown; {CORE_BYTES_PER_S / 1e9:g} GB/s per thread, at most {NODE_BYTES_PER_S / 1e9:g} per node, assumed"
    return guess, text
