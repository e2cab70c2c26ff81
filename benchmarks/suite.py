"""The whole table in one run: ours and its peers, each in a process of its own, with a table and a plot for the docs.

    python -m benchmarks.suite --json OUT.json
    python -m benchmarks.suite --json OUT.json --only 'experts-A-.*' --kt-python /opt/kt/bin/python
    python -m benchmarks.suite --json OUT.json --resume --budget 60 --wrap 'numactl -N 0'

Results are written to OUT.json after every case; `--resume` keeps those that are there. The table (suite.md) and the plot
(suite.png) go to `--docs`, docs/benchmarks by default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, all_cases, peer_cases
from benchmarks.report import Table, emit, number
from benchmarks.suite_report import COLUMNS, Row, rows_of, write_docs

ROOT = Path(__file__).parents[1]
SHORT_COLUMNS = ("case", "µs", "of the limit", "aim", "met", "error")  # suite.md has the rest


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.split("\n")[0])
    made.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the results go")
    made.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks", help="where table and plot go")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--only", default=".*", help="regex that a case's id must match as a whole")
    made.add_argument("--resume", action="store_true", help="keep the results that OUT has")
    made.add_argument("--no-peers", action="store_true", help="only ours")
    made.add_argument("--kt-python", help="an interpreter with kt-kernel, torch and numpy")
    made.add_argument("--wrap", default="", help="a command that each case is run under, such as 'numactl -N 0'")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--timeout", type=float, default=600, help="seconds per case")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this long; --resume goes on")
    made.add_argument("--list", action="store_true", help="print the cases' ids and stop")
    return made


def chosen(options: argparse.Namespace) -> list[Case]:
    """Our cases that `--only` names, each followed by the peers it is held against and that can be run."""
    wanted = re.compile(options.only)
    ours = [case for case in all_cases() if wanted.fullmatch(case.id)]
    if options.no_peers:
        return ours
    ordered: list[Case] = []
    seen: set[str] = set()
    for case in ours:
        ordered.append(case)
        new = {id for id in case.peers if id not in seen and (options.kt_python or not id.startswith("kt-"))}
        seen |= new
        ordered += peer_cases(new)
    return ordered


def command(case: Case, options: argparse.Namespace) -> list[str]:
    python = options.kt_python if case.module == "peers.kt_experts" else sys.executable
    rounds = ["--rounds", str(options.rounds)] if case.module in ("experts", "linear") else []
    threads = [] if case.module == "decode" else ["--threads", str(options.threads)]
    as_json = [] if case.module == "peers.torch_linear" else ["--json"]
    return [
        *shlex.split(options.wrap),
        *(python, "-m", f"benchmarks.{case.module}"),
        *case.arguments,
        *threads,
        *rounds,
        *as_json,
    ]


def last_json(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object: libraries print farewells."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The case's figures, or {"failed": why}; a case that cannot run on this machine must not stop the others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        ran = subprocess.run(
            command(case, options), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {options.timeout:.0f} s"}
    found = last_json(ran.stdout)
    if ran.returncode or found is None:
        lines = (ran.stderr or ran.stdout).strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit code {ran.returncode}"}
    return found


def short(row: Row) -> tuple[Any, ...]:
    return tuple(row.cells()[COLUMNS.index(name)] for name in SHORT_COLUMNS)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    cases = chosen(options)
    if options.list:
        print("\n".join(case.id for case in cases))
        return 0
    if not cases:
        print(f"--only {options.only!r} matches no case; --list --only '.*' names them", file=sys.stderr)
        return 2
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.resume and options.json.exists() else {}
    started, left = time.perf_counter(), 0
    for index, case in enumerate(cases, start=1):
        if "failed" not in results.get(case.id, {"failed": ""}):
            continue
        if options.budget is not None and time.perf_counter() - started >= options.budget:
            left += 1
            continue
        begin = time.perf_counter()
        results[case.id] = run_case(case, options)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        said = results[case.id].get("failed") or f"{case.figure} {number(results[case.id].get(case.figure))}"
        print(f"[{index}/{len(cases)}] {case.id}: {said} ({time.perf_counter() - begin:.0f} s)", flush=True)
    table = rows_of([case for case in all_cases() if case.id in results], results)
    written = write_docs(table, results, options.docs)
    emit(
        {
            "cases": len(results),
            "left": left,
            "failed": sorted(id for id, found in results.items() if "failed" in found),
            "results": str(options.json),
            "written": [str(path) for path in written],
        },
        [Table("numagraft and its peers", SHORT_COLUMNS, [short(row) for row in table])],
        as_json=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
