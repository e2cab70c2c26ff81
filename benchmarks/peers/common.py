"""What the peers share: arguments, weights, and the timing of calls."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import rotation
from benchmarks.bf16 import from_bf16, normal
from benchmarks.machine import Percentiles

ROTATION_BYTES = 2.1 * 2**30


def parser(program: str, formats: list[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{program}")
    for name, value in (("hidden", 2048), ("intermediate", 768), ("experts", 128), ("topk", 8), ("tokens", 1)):
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--format", choices=formats, default=formats[0])
    made.add_argument("--memory-gib", type=float, default=3.0, help="most memory for weights")
    made.add_argument("--seconds", type=float, default=2.5, help="of measured calls")
    made.add_argument("--error", action="store_true", help="also compare one call with fp32 and unquantised weights")
    made.add_argument("--json", action="store_true", help="ignored: the output is JSON")
    return made


def layers_and_experts(options: argparse.Namespace, *, bytes_per_weight: float) -> tuple[int, int]:
    """How many layers with how many experts fit and exceed every cache; as in benchmarks.experts."""
    expert = 3 * options.hidden * options.intermediate * bytes_per_weight
    room = options.memory_gib * 2**30
    experts = max(options.topk, min(options.experts, int(room // expert)))
    layers = rotation.layers_for(int(expert * experts), at_least=min(ROTATION_BYTES, room))
    return (layers - 1 if layers > 1 and layers * experts * expert > room else layers), experts


def gaussian(shape: tuple[int, ...], *, seed: int, std: float = 0.02) -> np.ndarray:
    """bf16 bits; one block of at most 2^24 different values, repeated, as making gigabytes would take a minute."""
    count = int(np.prod(shape))
    block = normal(min(count, 1 << 24), std=std, seed=seed)
    return np.resize(block, count).reshape(shape)


def routed(options: argparse.Namespace, *, layers: int, experts: int) -> Iterator[rotation.Call]:
    return rotation.calls(layers=layers, experts=experts, topk=options.topk, tokens=options.tokens)


def timed(call: Callable[[], Any], *, seconds: float, warm_up: int = 2, least: int = 10) -> dict[str, Any]:
    """Percentiles of the microseconds per call; `call` returns the nanoseconds that count, or None for all of them."""
    for _ in range(warm_up):
        call()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < until:
        begin = time.perf_counter_ns()
        own = call()
        found.append((own if own is not None else time.perf_counter_ns() - begin) / 1e3)
    us = Percentiles.of(found)
    return {"us_median": us.median, "us_p10": us.p10, "us_p90": us.p90, "calls": len(found)}


def expected(x: np.ndarray, made: rotation.Call, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The layer in fp32 with the bf16 weights as they were before any quantising; only chosen experts are expanded."""
    from benchmarks.operands import experts_in_fp32

    chosen = [int(expert) for expert in np.unique(made.ids)]
    return experts_in_fp32(
        from_bf16(x), made.ids, made.weights, *({e: from_bf16(of[e]) for e in chosen} for of in (gate, up, down))
    )


def print_result(result: dict[str, Any]) -> None:
    print(json.dumps(result, allow_nan=False), flush=True)
