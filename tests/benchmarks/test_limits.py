"""The loops that measure the machine read what they say they read and refuse what they cannot do."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numagraft import _native
from numagraft.errors import ConfigurationError
from numagraft.native import Runtime, limits
from numagraft.runtime import RuntimeLayout

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runtime():
    return Runtime(RuntimeLayout.virtual(2))


def words(buffer) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * buffer.bytes).from_address(buffer.address), dtype=np.uint64)


@pytest.mark.parametrize("width", limits.stream_widths())
@pytest.mark.parametrize("variant", _native.bench_stream_variants())
def test_every_stream_reads_every_word_once(runtime, width, variant):
    """The exclusive or over all words is that of one simple pass, for sizes that no stream count divides."""
    buffer = runtime.allocate(1 << 20, [0], owner="test")
    data = words(buffer)
    data.flags.writeable = True
    data[:] = np.random.default_rng(0).integers(0, 2**63, size=data.size, dtype=np.uint64)
    streams, ahead = variant
    for lines in (0, 1, 37, 16384 - 3):
        region = (buffer.address, lines * 64 + 17, [0, 1])
        _, read, checksum = _native.bench_stream(
            runtime.native, [region], streams=streams, prefetch_bytes=ahead, width=width
        )
        assert read == lines * 64
        assert checksum == int(np.bitwise_xor.reduce(data[: lines * 8], initial=np.uint64(0)))
    runtime.release(buffer)


def test_a_word_that_changed_changes_the_checksum(runtime):
    buffer = runtime.allocate(1 << 16, [0], owner="test")
    region = (buffer.address, buffer.bytes, [0])
    before = _native.bench_stream(runtime.native, [region], streams=4, prefetch_bytes=0, width="sse2")[2]
    words(buffer)[777] ^= np.uint64(1 << 40)
    after = _native.bench_stream(runtime.native, [region], streams=4, prefetch_bytes=0, width="sse2")[2]
    assert before ^ after == 1 << 40
    runtime.release(buffer)


def test_rates_are_sorted_and_cover_the_fixed_set(runtime):
    buffer = runtime.allocate(1 << 20, [0], owner="test")
    rates = limits.stream_rates(runtime, limits.regions_of([buffer]), passes=2)
    assert {(r.streams, r.prefetch_bytes) for r in rates} == {(s, p) for s in (1, 2, 4, 8) for p in (0, 2048, 4096)}
    assert [r.gb_per_s for r in rates] == sorted((r.gb_per_s for r in rates), reverse=True)
    assert all(0.01 < r.gb_per_s < 10_000 for r in rates)
    runtime.release(buffer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": 3}, "1, 2, 4 or 8 streams"),
        ({"prefetch_bytes": -64}, "prefetch distance"),
        ({"width": "avx1024"}, "does not run on this CPU"),
        ({"nodes": (2,)}, "node 2 of the runtime"),
        ({"nodes": ()}, "names no node"),
        ({"offset": 8}, "cache line"),
    ],
)
def test_what_cannot_be_streamed_is_an_error(runtime, change, message):
    buffer = runtime.allocate(4096, [0], owner="test")
    region = limits.Region(buffer.address + change.get("offset", 0), 1024, change.get("nodes", (0,)))
    with pytest.raises(ConfigurationError, match=message):
        limits.stream_seconds(
            runtime,
            [region],
            streams=change.get("streams", 1),
            prefetch_bytes=change.get("prefetch_bytes", 0),
            width=change.get("width"),
        )
    runtime.release(buffer)


@pytest.mark.parametrize("loop", limits.peak_loops(), ids=lambda loop: loop.name)
def test_peaks_that_this_cpu_has_are_plausible_and_others_are_refused(runtime, loop):
    if not loop.supported:
        with pytest.raises(ConfigurationError, match="cannot run"):
            limits.multiply_peak(runtime, loop.name)
        return
    one = limits.multiply_peak(runtime, loop.name, nodes=[0], seconds=0.002, repetitions=2)
    # 16 operations a cycle at 0.1 GHz is less, 4 x 16,384 at 6 GHz is more, than any core does
    assert 1e9 < one < 4e14


def test_an_unknown_peak_is_an_error(runtime):
    with pytest.raises(ConfigurationError, match="no peak loop named 'mmx'"):
        limits.multiply_peak(runtime, "mmx")


def test_a_fork_join_takes_time(runtime):
    seconds = limits.fork_join_seconds(runtime, barriers=2, repetitions=20)
    assert len(seconds) == 20 and all(0 < s < 5 for s in seconds)


def test_the_command_prints_its_keys():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.limits", "--gib", "0.01", "--passes", "1"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["stream_gbps"] == max(rate["gb_per_s"] for rate in result["stream"])
    assert result["fork_join_us"] > 0 and "sse2_fp32" in result["peak_tops"]
