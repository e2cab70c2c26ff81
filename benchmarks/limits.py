"""What this machine can do at most: streaming reads, multiplications per instruction set, and the price of one fork-join.

python -m benchmarks.limits --threads 2 --json
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import machine
from benchmarks.machine import Percentiles
from benchmarks.report import Table, emit


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.split("\n")[0])
    made.add_argument("--threads", type=int, help="threads of all nodes together (default: every core)")
    made.add_argument("--gib", type=float, default=2.1, help="memory to stream (default 2.1: more than any cache)")
    made.add_argument("--passes", type=int, default=3)
    made.add_argument("--all-widths", action="store_true", help="stream with narrower registers as well")
    made.add_argument("--json", action="store_true", help="print only the JSON line")
    return made


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[Table]]:
    from numagraft import native
    from numagraft.native import limits

    runtime = native.Runtime(machine.layout(options.threads))
    nodes = [i for i, node in enumerate(runtime.layout.nodes) if node.threads > 0]
    held = [runtime.allocate(int(options.gib * 2**30 / len(nodes)), [node], owner="benchmark") for node in nodes]
    regions = limits.regions_of(held)
    rates = limits.stream_rates(
        runtime, regions, passes=options.passes, widths=limits.stream_widths() if options.all_widths else None
    )
    loops = limits.peak_loops()
    peaks = {loop.name: limits.multiply_peak(runtime, loop.name) / 1e12 for loop in loops if loop.supported}
    joins = {
        barriers: Percentiles.of([s * 1e6 for s in limits.fork_join_seconds(runtime, barriers=barriers)])
        for barriers in (0, 2)
    }
    result = {
        "stream_gbps": rates[0].gb_per_s,
        "stream": [vars(rate) for rate in rates],
        "peak_tops": peaks,
        "fork_join_us": joins[0].median,
        "fork_join_us_p90": joins[0].p90,
        "fork_join_2_barriers_us": joins[2].median,
        "threads": sum(node.threads for node in runtime.layout.nodes),
    }
    tables = [
        Table(
            "streaming read",
            ("streams", "prefetch, bytes", "registers", "GB/s"),
            [(rate.streams, rate.prefetch_bytes, rate.width, rate.gb_per_s) for rate in rates],
        ),
        Table(
            "multiply peaks",
            ("loop", "instructions", "T op/s"),
            [(loop.name, loop.instructions, peaks.get(loop.name)) for loop in loops],
        ),
        Table(
            "one fork-join, µs",
            ("barriers inside", "median", "p10", "p90"),
            [(barriers, us.median, us.p10, us.p90) for barriers, us in joins.items()],
        ),
    ]
    return result, tables


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from numagraft.errors import NumagraftError

    try:
        result, tables = run(options)
    except NumagraftError as error:
        print(error, file=sys.stderr)
        return 2
    emit(result, tables, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
