"""The machine's limits, measured: streaming read bandwidth, multiply peaks, and the cost of one fork-join.

On the runtime's own threads and on memory that is already placed, so that a kernel and its limit see the same pages.
Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numagraft import _native
from numagraft.errors import ConfigurationError

if TYPE_CHECKING:
    from numagraft.native import PlacedBuffer, Runtime


@dataclass(frozen=True)
class Region:
    """Memory to read, and the runtime nodes (indices) whose threads read it, each an equal share.

    `address` lies on a cache line; of a rest below 64 bytes nothing is read.
    """

    address: int
    bytes: int
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class StreamRate:
    """Read bandwidth of one variant in 10^9 bytes/s: the median of `passes` over all regions."""

    streams: int
    prefetch_bytes: int
    width: str
    gb_per_s: float
    passes: int


@dataclass(frozen=True)
class PeakLoop:
    """A multiply loop in registers; `instructions` is for people."""

    name: str
    instructions: str
    supported: bool


def regions_of(buffers: Iterable[PlacedBuffer]) -> list[Region]:
    """Placed weights as regions, read by the threads of the nodes that hold them."""
    return [Region(buffer.address, buffer.bytes, tuple(buffer.nodes)) for buffer in buffers]


def stream_widths() -> tuple[str, ...]:
    """Register widths of the reading loop that this CPU has, widest last."""
    return tuple(_native.bench_stream_widths())


def stream_variants() -> int:
    """How many variants `stream_rates` tries of one width."""
    return len(_native.bench_stream_variants())


def stream_seconds(
    runtime: Runtime, regions: Sequence[Region], *, streams: int, prefetch_bytes: int, width: str | None = None
) -> tuple[float, int]:
    """Seconds for reading every region once, and the bytes that were read; `width` None is the widest.

    Raises ConfigurationError for a variant or a width that is not there.
    """
    try:
        seconds, read, _ = _native.bench_stream(
            runtime.native,
            [(region.address, region.bytes, list(region.nodes)) for region in regions],
            streams=streams,
            prefetch_bytes=prefetch_bytes,
            width=width or stream_widths()[-1],
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return seconds, read


def stream_rates(
    runtime: Runtime, regions: Sequence[Region], *, passes: int = 3, widths: Sequence[str] | None = None
) -> list[StreamRate]:
    """Bandwidth of each variant of the fixed set (1 to 8 streams, prefetch off and two distances), best first.

    Every variant takes its turn in each pass, so that a noisy moment falls on all of them.
    """
    chosen = [
        (streams, ahead, width)
        for width in widths or stream_widths()[-1:]
        for streams, ahead in _native.bench_stream_variants()
    ]
    rates: dict[tuple[int, int, str], list[float]] = {variant: [] for variant in chosen}
    for _ in range(passes):
        for streams, ahead, width in chosen:
            seconds, read = stream_seconds(runtime, regions, streams=streams, prefetch_bytes=ahead, width=width)
            rates[streams, ahead, width].append(read / seconds / 1e9)
    return sorted(
        (StreamRate(*variant, statistics.median(found), passes) for variant, found in rates.items()),
        key=lambda rate: -rate.gb_per_s,
    )


def make_chase(runtime: Runtime, region: Region) -> None:
    """Fills the region with one random cycle over its cache lines, written by a worker of the region's first node.

    Whatever the memory held is lost. Raises ConfigurationError for memory off a cache line or a node without threads.
    """
    try:
        _native.bench_make_chase(runtime.native, region.nodes[0], region.address, region.bytes)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def load_seconds(runtime: Runtime, region: Region, *, steps: int = 200_000) -> float:
    """Seconds of one load that waits for the one before it, along the cycle of `make_chase`, by the region's first node.

    Only larger than the caches is the region a measure of memory; small pages add the cost of translation.
    """
    try:
        return _native.bench_run_chase(runtime.native, region.nodes[0], region.address, steps) / steps
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def peak_loops() -> list[PeakLoop]:
    return [PeakLoop(*row) for row in _native.bench_peaks()]


def multiply_peak(
    runtime: Runtime, name: str, *, nodes: Sequence[int] | None = None, seconds: float = 0.02, repetitions: int = 5
) -> float:
    """Operations per second of all threads together in the loop `name`: the median of the repetitions.

    A multiply-accumulate is two operations. Raises ConfigurationError for a loop that this CPU cannot run.
    """
    try:
        found = _native.bench_multiply_peak(
            runtime.native, _all_nodes(runtime, nodes), name, seconds=seconds, repetitions=repetitions
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return statistics.median(found)


def fork_join_seconds(
    runtime: Runtime, *, nodes: Sequence[int] | None = None, barriers: int = 0, repetitions: int = 2000
) -> list[float]:
    """Seconds of each of `repetitions` calls that do nothing but meet `barriers` times, the pools awake."""
    return _native.bench_fork_join(
        runtime.native, _all_nodes(runtime, nodes), barriers=barriers, repetitions=repetitions
    )


def _all_nodes(runtime: Runtime, nodes: Sequence[int] | None) -> list[int]:
    if nodes is not None:
        return list(nodes)
    return [index for index, node in enumerate(runtime.layout.nodes) if node.threads > 0]
