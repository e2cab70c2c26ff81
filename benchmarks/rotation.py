"""Which experts and layers each measured call uses: routed as in a model, yet always met in memory and never in a cache.

A shared last-level cache of hundreds of megabytes catches experts that random routing chooses again; so the routing's
pattern is random, and the experts it lands on follow each other through all of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Call:
    """One call: the layer, int64 ids [tokens, topk] (distinct in a row), fp32 weights that sum to one in a row."""

    layer: int
    ids: np.ndarray
    weights: np.ndarray
    distinct: int


def random_routing(tokens: int, experts: int, topk: int, generator: np.random.Generator) -> np.ndarray:
    """Every token chooses `topk` different experts, all choices equally likely."""
    return np.argsort(generator.random((tokens, experts)), axis=1)[:, :topk]


def calls(*, layers: int, experts: int, topk: int, tokens: int, seed: int = 0) -> Iterator[Call]:
    """An endless sequence of calls, layer after layer.

    The distinct experts of a call are relabelled to be neighbours that begin where the layer's last call ended: an expert
    comes back only after the others of its layer, whatever the routing.
    """
    generator = np.random.default_rng(seed)
    begin = [0] * layers
    while True:
        for layer in range(layers):
            routed = random_routing(tokens, experts, topk, generator)
            chosen = np.unique(routed)
            label = np.empty(experts, dtype=np.int64)
            label[chosen] = (begin[layer] + generator.permutation(len(chosen))) % experts
            begin[layer] = (begin[layer] + len(chosen)) % experts
            weights = generator.random((tokens, topk), dtype=np.float32) + np.float32(0.1)
            yield Call(
                layer=layer,
                ids=np.ascontiguousarray(label[routed]),
                weights=weights / weights.sum(axis=1, keepdims=True),
                distinct=len(chosen),
            )


def layers_for(layer_bytes: int, *, at_least: float) -> int:
    """Layers that together take `at_least` bytes."""
    return max(1, -int(-at_least // layer_bytes))
