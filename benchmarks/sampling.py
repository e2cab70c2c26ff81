"""Timing an operator and its limits in turns, so that a noisy neighbour meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.machine import Percentiles, Work, against_limits, multiply_peak

if TYPE_CHECKING:
    from numagraft.native import Runtime
    from numagraft.native.limits import Region

#: a call that is ready to be made, and what it has to do
Prepared = tuple[Callable[[], None], Work]


@dataclass(frozen=True)
class Sampling:
    """`rounds` turns of limits and calls; a turn calls for `seconds` and at least `least` times."""

    rounds: int = 5
    seconds: float = 0.5
    least: int = 4


def sample(
    prepared: Iterator[Prepared],
    runtime: Runtime,
    regions: Sequence[Region],
    *,
    kind: str,
    isa: str,
    activations: str = "auto",
    warm_up: int = 1,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Every figure of an operator benchmark.

    `prepared` yields calls, each on weights that the ones before did not use; only the calls are timed. `regions` are the
    weights' memory: the stream loops read the same pages.
    """
    from numagraft.native import limits

    plan = sampling or Sampling()
    for _ in range(warm_up):
        next(prepared)[0]()
    microseconds: list[float] = []
    works: list[Work] = []
    streams: dict[tuple[int, int], list[float]] = {}
    peaks: list[float] = []
    peak_loop = ""
    for _ in range(plan.rounds):
        for rate in limits.stream_rates(runtime, regions, passes=1):
            streams.setdefault((rate.streams, rate.prefetch_bytes), []).append(rate.gb_per_s)
        peak, peak_loop = multiply_peak(runtime, kind, isa, activations=activations)
        peaks.append(peak)
        until = time.perf_counter() + plan.seconds
        made = 0
        while made < plan.least or time.perf_counter() < until:
            call, work = next(prepared)
            begin = time.perf_counter_ns()
            call()
            microseconds.append((time.perf_counter_ns() - begin) / 1e3)
            works.append(work)
            made += 1
    (variant, rates) = max(streams.items(), key=lambda item: statistics.median(item[1]))
    mean = Work(
        statistics.fmean(work.weight_bytes for work in works), statistics.fmean(work.operations for work in works)
    )
    figures = against_limits(
        Percentiles.of(microseconds),
        mean,
        stream_gbps=statistics.median(rates),
        peak_tops=statistics.median(peaks),
    )
    return {
        **figures,
        "isa": isa,
        "calls": len(microseconds),
        "stream_variant": {"streams": variant[0], "prefetch_bytes": variant[1]},
        "peak_loop": peak_loop,
    }
