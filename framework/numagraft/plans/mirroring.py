"""What a copy of the weights on every node buys over shards, predicted, and whether `auto` should make one. No torch.

A lone request decodes alike: copies divide the columns as shards do, and both read every byte once from local memory. What
differs: callers at once, each computing on a node of its own, wait for no fork-join over nodes; a prefill is divided by
tokens, so that nothing has to be added up over nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from numagraft.plans.rates import Load, Rates
from numagraft.sizes import format_size

#: `auto` mirrors from this gain on: N times the memory for less than what predictions err by would be waste
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Gain:
    """Tokens per second of shards and of copies for the same work."""

    shard_tokens_per_s: float
    mirror_tokens_per_s: float

    @property
    def share(self) -> float:
        return self.mirror_tokens_per_s / self.shard_tokens_per_s - 1


@dataclass(frozen=True)
class MirrorGains:
    """For all packed weights of a plan on all its nodes. `callers`: that many decode at once, their tokens added up."""

    nodes: int
    copy_bytes: int  # of all packed weights once: what each node holds
    decode: Gain
    prefill: Gain
    callers: Gain

    @classmethod
    def of(cls, rates: Rates, load: Load) -> MirrorGains:
        nodes = rates.nodes
        alone = 1 / rates.decode_seconds(load, nodes)
        together = sum(1 / rates.decode_seconds(load, (node,)) for node in nodes)
        return cls(
            nodes=len(nodes),
            copy_bytes=load.packed_bytes,
            decode=Gain(alone, alone),
            prefill=Gain(
                1 / rates.prefill_seconds(load, nodes, adds_shards=True), 1 / rates.prefill_seconds(load, nodes)
            ),
            # calls on shards need every node, so that callers take turns
            callers=Gain(alone, together),
        )

    def facts(self) -> tuple[str, ...]:
        """What a mirror buys here, whether it is worth its memory or not."""
        return (
            f"prefill divided by tokens over {self.nodes} nodes ({_compare(self.prefill)})",
            f"{self.nodes} callers served at once ({_compare(self.callers)} decoding together)",
            "a late node is helped by the others, from their own copies",
            f"{format_size(self.copy_bytes)} on each node instead of {format_size(self.copy_bytes // self.nodes)}",
        )

    def reasons(self) -> tuple[str, ...]:
        """The facts that gain enough for `auto` to mirror; empty: shard."""
        prefill, callers, _, memory = self.facts()
        found = [fact for fact, gain in ((prefill, self.prefill), (callers, self.callers)) if gain.share >= LEAST_GAIN]
        return (*found, memory) if found else ()

    def too_little(self) -> str:
        """Why `auto` does not mirror although there is room."""
        return (
            f"copies would gain {_percent(self.callers)} with {self.nodes} callers at once ({_compare(self.callers)}), "
            f"{_percent(self.prefill)} in prefill and nothing for a lone request, less than the {LEAST_GAIN:.0%} that "
            f"{self.nodes} times the memory must bring"
        )


def _compare(gain: Gain) -> str:
    return f"{_rate(gain.mirror_tokens_per_s)} tokens/s, sharded {_rate(gain.shard_tokens_per_s)}"


def _percent(gain: Gain) -> str:
    return f"{gain.share:.1%}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
