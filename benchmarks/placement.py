"""What the proof of placement costs: asking the kernel where every page of placed weights lies.

    python -m benchmarks.placement --json

`verify_seconds_per_gib` is with 4 KiB pages, each of which is asked; `verify_seconds_per_gib_huge` with transparent huge
pages, as far as `page_bytes_huge` says that they were got. `query_*` is the system's part of it without the report.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

from benchmarks import machine
from benchmarks.report import Table, emit

GIB = 2**30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__.split("\n")[0])
    made.add_argument("--gib", type=float, default=2.0, help="memory to place and verify (default 2)")
    made.add_argument("--buffers", type=int, default=32, help="weights that it is divided into (default 32)")
    made.add_argument("--repeat", type=int, default=5)
    made.add_argument("--json", action="store_true", help="print only the JSON line")
    return made


def measure(pages: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures with one kind of pages: "4k", "thp", "2m" or "1g"."""
    from numagraft import native
    from numagraft.native.runtime import PlacedBuffer
    from numagraft.placement import Part, Placement
    from numagraft.report import PlacedWeight, build_report

    runtime = native.Runtime(replace(machine.layout(None), pages=pages))
    nodes = [i for i, node in enumerate(runtime.layout.nodes) if node.threads > 0]
    size = int(options.gib * GIB / options.buffers)
    weights, buffers = [], []
    begin = time.perf_counter()
    for index in range(options.buffers):
        node = nodes[index % len(nodes)]
        held = runtime.allocate(size, [node], owner=f"layers.{index}")
        buffers.append(PlacedBuffer.of(held))
        placement = Placement("bind", (Part((node,), False, (node,), 0, 1),))
        weights.append(PlacedWeight("benchmark", f"layers.{index}", placement, (buffers[-1],)))
    allocating = time.perf_counter() - begin
    total = sum(buffer.bytes for buffer in buffers) / GIB

    reports, queries = [], []
    for _ in range(options.repeat):
        begin = time.perf_counter()
        report = build_report(weights, runtime)
        reports.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        counts = [native.query_pages(buffer.address, buffer.bytes) for buffer in buffers]
        queries.append(time.perf_counter() - begin)
    page_bytes: dict[str, int] = {}
    for arena in runtime.memory_report():
        for page, resident in arena.page_bytes.items():
            page_bytes[str(page)] = page_bytes.get(str(page), 0) + resident
    return {
        "gib": total,
        "verify": statistics.median(reports) / total,
        "query": statistics.median(queries) / total,
        "allocate": allocating / total,
        "page_bytes": page_bytes,
        "method": sorted({count.method for count in counts}),
        "ok": report.ok,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from numagraft.errors import NumagraftError

    try:
        small, huge = measure("4k", options), measure("thp", options)
    except NumagraftError as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "gib": small["gib"],
        "buffers": options.buffers,
        "verify_seconds_per_gib": small["verify"],
        "verify_seconds_per_gib_huge": huge["verify"],
        "query_seconds_per_gib": small["query"],
        "query_seconds_per_gib_huge": huge["query"],
        "allocate_seconds_per_gib": small["allocate"],
        "allocate_seconds_per_gib_huge": huge["allocate"],
        "page_bytes": small["page_bytes"],
        "page_bytes_huge": huge["page_bytes"],
        "method": small["method"],
        "verified": small["ok"] and huge["ok"],
    }
    rows = [
        (name, found["verify"], found["query"], found["allocate"], str(found["page_bytes"]))
        for name, found in (("4 KiB", small), ("transparent huge", huge))
    ]
    columns = (
        "pages asked for",
        "report, s/GiB",
        "queries alone, s/GiB",
        "allocation, s/GiB",
        "got: bytes by page size",
    )
    emit(result, [Table("verifying placement", columns, rows)], as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
