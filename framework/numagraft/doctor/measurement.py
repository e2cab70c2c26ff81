"""Read bandwidth and latency from every node to every node, measured and kept for planning."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numagraft.doctor.finding import Finding
from numagraft.errors import ConfigurationError, Problem
from numagraft.platform import Platform
from numagraft.platform.plain import from_plain, to_plain
from numagraft.runtime import RuntimeLayout, RuntimeSettings

if TYPE_CHECKING:
    from numagraft.native import Runtime, limits

SCHEMA = 1
_MIB = 1 << 20
#: Large enough that caches hold little of it; first touch of fresh memory runs at 0.5-2.5 GB/s.
_LEAST_BYTES, _MOST_BYTES = 256 * _MIB, 1024 * _MIB
#: What is left of 20 seconds is for starting up and printing.
BUDGET_SECONDS = 14.0
_TRIAL_BYTES = 16 * _MIB
_STEPS = 200_000
_PASSES = 5


@dataclass(frozen=True)
class Measurement:
    """`read_gb_per_s[i][j]`: all threads of compute_nodes[i] read memory of memory_nodes[j], in 10^9 bytes/s;
    `latency_ns[i][j]`: one load that waits for the one before. Nodes are the kernel's ids."""

    fingerprint: str
    compute_nodes: tuple[int, ...]
    memory_nodes: tuple[int, ...]
    threads: tuple[int, ...]  # per compute node
    read_gb_per_s: tuple[tuple[float, ...], ...]
    latency_ns: tuple[tuple[float, ...], ...]
    buffer_bytes: int
    passes: int
    seconds: float
    kernel: str = ""
    taken: str = ""  # ISO date and time

    def local_gb_per_s(self, node: int) -> float | None:
        """Of a node's own threads on its own memory; None for a node without either."""
        if node not in self.compute_nodes or node not in self.memory_nodes:
            return None
        return self.read_gb_per_s[self.compute_nodes.index(node)][self.memory_nodes.index(node)]

    def save(self, path: Path | None = None) -> Path:
        """Writes it where `load` finds it; gives the path. Raises OSError."""
        path = path or saved_at(self.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"schema": SCHEMA, **to_plain(self)}), encoding="utf-8")
        draft.replace(path)
        return path

    @classmethod
    def load(cls, platform: Platform, path: Path | None = None) -> Measurement | None:
        """What was measured on this machine with these CPUs allowed; None when nothing was, or it cannot be read."""
        found = fingerprint(platform)
        try:
            data = json.loads((path or saved_at(found)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            return None
        problems: list[Problem] = []
        measurement = from_plain(cls, data, problems)
        return measurement if measurement is not None and measurement.fingerprint == found else None

    def to_json(self) -> dict[str, Any]:
        return to_plain(self)

    def findings(self) -> list[Finding]:
        """What the figures say that the firmware's distances do not."""
        local = {node: rate for node in self.compute_nodes if (rate := self.local_gb_per_s(node)) is not None}
        found = []
        if len(local) > 1 and max(local.values()) > 1.25 * min(local.values()):
            slow, fast = min(local, key=local.__getitem__), max(local, key=local.__getitem__)
            found.append(
                Finding(
                    "advice",
                    "uneven-bandwidth",
                    f"node {slow} reads its own memory at {local[slow]:.3g} GB/s, node {fast} at {local[fast]:.3g}",
                    "look for empty memory channels, another load, or a governor that keeps the clock down on that node",
                )
            )
        return found

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        def matrix(title: str, rows: Sequence[Sequence[float]]) -> Text:
            lines = [f"{title}\n{'node':>8}" + "".join(f"{node:>8}" for node in self.memory_nodes)]
            for node, row in zip(self.compute_nodes, rows, strict=True):
                lines.append(f"{node:>8}" + "".join(f"{value:>8.1f}" for value in row))
            return Text("\n".join(lines))

        return Group(
            matrix("read GB/s, all threads of a row's node, memory of a column's node", self.read_gb_per_s),
            matrix("latency ns", self.latency_ns),
        )


def measure(
    platform: Platform,
    *,
    buffer_bytes: int | None = None,
    budget_seconds: float = BUDGET_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> Measurement:
    """Measures all pairs in about `budget_seconds` at most: buffers are smaller and repetitions fewer where nodes are many or
    slow.

    Raises ConfigurationError for a replayed platform or one without room for the buffer.
    """
    if not platform.live:
        raise ConfigurationError(
            "only the machine at hand can be measured", [Problem("", f"{platform.source} is a dump", "run it there")]
        )
    from numagraft import native

    started = time.monotonic()
    chosen = tuple(sorted({*platform.usable_nodes, *platform.memory_only_nodes}))
    settings = RuntimeSettings(nodes=chosen) if platform.usable_nodes else RuntimeSettings()
    layout = RuntimeLayout.from_platform(platform, settings)
    probe = _Probe(native.Runtime(layout))
    size = buffer_bytes or _buffer_bytes(platform, layout)
    compute = layout.compute_nodes
    columns = range(len(layout.nodes))
    speed = probe.trial(min(size, _TRIAL_BYTES), budget_seconds)
    if buffer_bytes is None:
        size = speed.affordable(size, columns=len(columns), rows=len(compute))
    passes = speed.passes(size, columns=len(columns), rows=len(compute))
    streams, prefetch_bytes = probe.best_variant(min(size, _LEAST_BYTES))
    rates: dict[tuple[int, int], float] = {}
    delays: dict[tuple[int, int], float] = {}
    for column in columns:
        if progress is not None:
            progress(f"memory of node {layout.nodes[column].os_node}")
        with probe.memory_of(column, size) as regions:
            for row in compute:
                rates[row, column] = probe.rate(regions[row], streams, prefetch_bytes, passes)
                delays[row, column] = probe.delay(regions[row], min(passes, 3))
        spent = time.monotonic() - started
        if spent / (column + 1) * len(columns) > budget_seconds:  # slower than the trial: something else runs
            passes = 1
            if buffer_bytes is None:
                size = max(_TRIAL_BYTES, size // 2)
    return Measurement(
        fingerprint=fingerprint(platform),
        compute_nodes=tuple(_os_node(layout, row) for row in compute),
        memory_nodes=tuple(_os_node(layout, column) for column in columns),
        threads=tuple(layout.nodes[row].threads for row in compute),
        read_gb_per_s=tuple(tuple(round(rates[row, column], 2) for column in columns) for row in compute),
        latency_ns=tuple(tuple(round(delays[row, column], 1) for column in columns) for row in compute),
        buffer_bytes=size,
        passes=passes,
        seconds=round(time.monotonic() - started, 2),
        kernel=platform.kernel.release,
        taken=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


@dataclass(frozen=True)
class _Speed:
    """Seconds per byte of making a buffer's memory ready and of reading it once, seconds of one chase, read variants, and the
    seconds that all may take."""

    prepare: float
    read: float
    chase: float
    variants: int
    budget: float = BUDGET_SECONDS

    def affordable(self, wanted: int, *, columns: int, rows: int) -> int:
        """The largest buffer up to `wanted` with which a single pass of everything takes half the time there is."""
        left = self.budget / 2 - columns * rows * self.chase
        per_byte = columns * (self.prepare + rows * self.read) + self.variants * self.read
        return max(min(wanted, _TRIAL_BYTES), min(wanted, int(left / per_byte) // _MIB * _MIB))

    def passes(self, size: int, *, columns: int, rows: int) -> int:
        """As many as fit in the time there is; an odd number has a median that was measured."""
        once = columns * rows * (size * self.read + self.chase)
        left = self.budget - size * (columns * self.prepare + self.variants * self.read)
        return max(passes for passes in range(1, _PASSES + 1, 2) if passes == 1 or passes * once < left)


class _Probe:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._layout = runtime.layout
        self._compute = runtime.layout.compute_nodes
        runtime.observe_workers()  # the pools start: that is no part of any timing

    @contextmanager
    def memory_of(self, node: int, size: int) -> Iterator[dict[int, limits.Region]]:
        """A buffer there, with a chase in it: by the runtime node that reads."""
        from numagraft.native import limits

        buffer = self._runtime.allocate(size, [node], owner="doctor --measure")
        try:
            regions = {row: limits.Region(buffer.address, buffer.bytes, (row,)) for row in self._compute}
            limits.make_chase(self._runtime, regions[self._layout.nearest_compute_nodes(node)[0]])
            yield regions
        finally:
            self._runtime.release(buffer)

    def trial(self, size: int, budget: float) -> _Speed:
        """How fast this machine does all this, on a buffer that takes milliseconds on any server."""
        from numagraft.native import limits

        begin = time.monotonic()
        with self.memory_of(self._compute[0], size) as regions:
            prepared = time.monotonic()
            self.rate(regions[self._compute[0]], 1, 0, 1)
            read = time.monotonic()
            self.delay(regions[self._compute[0]], 1)
            chased = time.monotonic()
        variants = limits.stream_variants()
        return _Speed((prepared - begin) / size, (read - prepared) / size, chased - read, variants, budget)

    def best_variant(self, size: int) -> tuple[int, int]:
        """(streams, prefetch distance) that read fastest: that does not hang on how far the memory is."""
        from numagraft.native import limits

        with self.memory_of(self._compute[0], size) as regions:
            best = limits.stream_rates(self._runtime, [regions[self._compute[0]]], passes=1)[0]
        return best.streams, best.prefetch_bytes

    def rate(self, region: limits.Region, streams: int, prefetch_bytes: int, passes: int) -> float:
        """10^9 bytes/s, the median."""
        from numagraft.native import limits

        found = [
            limits.stream_seconds(self._runtime, [region], streams=streams, prefetch_bytes=prefetch_bytes)
            for _ in range(passes)
        ]
        return statistics.median(read / seconds / 1e9 for seconds, read in found)

    def delay(self, region: limits.Region, passes: int) -> float:
        """Nanoseconds, the shortest: whatever disturbs a chase makes it longer."""
        from numagraft.native import limits

        return min(limits.load_seconds(self._runtime, region, steps=_STEPS) * 1e9 for _ in range(passes))


def fingerprint(platform: Platform) -> str:
    """The same machine with the same CPUs and memory allowed: model, nodes, their CPUs, and memory to the GiB."""
    facts = [
        platform.cpu.model,
        platform.allowed_cpus,
        platform.allowed_nodes,
        [(node.id, node.cpus, round(node.total_bytes / (1 << 30))) for node in platform.nodes],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def saved_at(fingerprint: str) -> Path:
    """Below $XDG_CACHE_HOME, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "numagraft" / "bandwidth" / f"{fingerprint}.json"


def _os_node(layout: RuntimeLayout, index: int) -> int:
    os_node = layout.nodes[index].os_node
    return index if os_node is None else os_node


def _buffer_bytes(platform: Platform, layout: RuntimeLayout) -> int:
    wanted = min(_MOST_BYTES, max(_LEAST_BYTES, 2 * (platform.l3_bytes or 0)))
    room = min(node.free_bytes for node in layout.nodes) // 2
    if room < 16 * _MIB:
        least = min(layout.nodes, key=lambda node: node.free_bytes)
        raise ConfigurationError(
            "no room to measure",
            [Problem(f"node {least.os_node}", f"{least.free_bytes >> 20} MiB are free", "free memory there first")],
        )
    return min(wanted, room) // _MIB * _MIB
