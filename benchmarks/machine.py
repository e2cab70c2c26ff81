"""What the operator benchmarks share: the runtime they ask for, and the limits that they are held against."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numagraft.native import Runtime
    from numagraft.placement import Part
    from numagraft.runtime import RuntimeLayout

#: the multiply loops that bound a weight kind on a kernel row; where there are several, the fastest of this CPU's counts
PEAKS: dict[str, dict[str, tuple[str, ...]]] = {
    "int8": {
        "scalar": ("sse2_fp32",),
        "avx2": ("avx2_int8",),
        "avx512": ("avx512_int8",),
        "avx512_vnni": ("avx512_vnni_int8",),
        "amx": ("amx_int8",),
    },
    "int4": {
        "scalar": ("sse2_fp32",),
        "avx2": ("avx2_int8", "avx2_int4"),
        "avx512": ("avx512_int8",),
        "avx512_vnni": ("avx512_vnni_int8",),
        "amx": ("amx_int8",),
    },
    "bf16": {
        "scalar": ("sse2_fp32",),
        "avx2": ("avx2_fp32",),
        "avx512": ("avx512_fp32", "avx512_bf16"),
        "avx512_vnni": ("avx512_fp32", "avx512_bf16"),
        "amx": ("amx_bf16",),
    },
}
PEAKS["mxfp4"] = PEAKS["int4"]
PEAKS["fp8"] = PEAKS["bf16"]


def force_isa(isa: str | None) -> None:
    """Makes the native backend use that kernel row; before its first use."""
    if isa is not None:
        os.environ["NUMAGRAFT_ISA"] = isa


def layout(threads: int | None, *, nodes: Sequence[int] | None = None) -> RuntimeLayout:
    """This machine's layout with `threads` threads on `nodes` (kernel ids) together; None: every core of them.

    Raises ConfigurationError when the threads do not divide over the nodes.
    """
    from numagraft.errors import ConfigurationError
    from numagraft.platform import Platform
    from numagraft.runtime import RuntimeLayout, RuntimeSettings

    platform = Platform.detect()
    settings = RuntimeSettings(nodes="all" if nodes is None else tuple(nodes))
    found = RuntimeLayout.from_platform(platform, settings)
    if threads is None:
        return found
    working = sum(node.threads > 0 for node in found.nodes)
    if threads % working:
        raise ConfigurationError(f"--threads is {threads}: expected a multiple of the {working} nodes in use")
    return RuntimeLayout.from_platform(platform, replace(settings, threads_per_node=threads // working))


@dataclass(frozen=True)
class Units:
    """What placement asks of a weight; see numagraft.contract.Units, which imports torch."""

    count: int
    multiple: int = 128  # inputs or outputs that every format's groups and tiles divide
    packed_bytes: int = 1 << 30  # what `auto` does with small weights is not what is measured here


def parts(policy: str, units: int, layout: RuntimeLayout) -> tuple[Part, ...]:
    """Where `units` output or intermediate features lie under `policy`.

    Raises ConfigurationError for a policy that there is not.
    """
    from numagraft.placement import parse, resolve

    return resolve(parse(policy, where="--placement"), Units(units), layout, where="--placement").parts


@dataclass(frozen=True)
class Percentiles:
    """Of microseconds per call."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Percentiles:
        if len(microseconds) == 1:
            return cls(*([microseconds[0]] * 3))
        tenths = statistics.quantiles(microseconds, n=10, method="inclusive")
        return cls(median=statistics.median(microseconds), p10=tenths[0], p90=tenths[8])


@dataclass(frozen=True)
class Work:
    """One call: bytes of distinct weights it must read, and operations it must do (a multiply-accumulate counts two)."""

    weight_bytes: float
    operations: float


def against_limits(us: Percentiles, work: Work, *, stream_gbps: float, peak_tops: float) -> dict[str, float]:
    """The figures every operator benchmark prints.

    limit_us = max(distinct weight bytes / streaming read bandwidth, operations / multiply peak).
    """
    weight_gbps = work.weight_bytes / us.median / 1e3
    tops = work.operations / us.median / 1e6
    limit_us = max(work.weight_bytes / stream_gbps / 1e3, work.operations / peak_tops / 1e6)
    return {
        "us_median": us.median,
        "us_p10": us.p10,
        "us_p90": us.p90,
        "weight_gbps": weight_gbps,
        "stream_gbps": stream_gbps,
        "fraction_of_stream": weight_gbps / stream_gbps,
        "tops": tops,
        "peak_tops": peak_tops,
        "fraction_of_peak": tops / peak_tops,
        "limit_us": limit_us,
        "fraction_of_limit": limit_us / us.median,
    }


def multiply_peak(runtime: Runtime, kind: str, isa: str, *, activations: str = "auto") -> tuple[float, str]:
    """T op/s of the fastest loop that bounds weights of `kind` on the kernel row `isa`, and the loop's name.

    Integer weights whose inputs stay bf16 are bound by the bf16 loops.
    """
    from numagraft.native import limits

    here = {loop.name for loop in limits.peak_loops() if loop.supported}
    names = PEAKS["bf16" if activations == "bf16" else kind][isa]
    rates = {name: limits.multiply_peak(runtime, name) / 1e12 for name in names if name in here}
    best = max(rates, key=rates.__getitem__)
    return rates[best], best
