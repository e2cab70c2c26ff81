"""The lab's command line: `python -m tests.lab setup | list | run | ci`."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from . import machine
from .kernel import Cache, Unavailable, setup
from .topologies import TOPOLOGIES, Topology, with_nodes

CI_TOPOLOGIES = ("2-nodes", "4-nodes", "memory-only-node")
CI_SECONDS = 360  # for each; they take 60 to 70 on an idle machine
SPARE_MIB = 1024  # what the emulator and the machine itself need besides the guest's memory
PROJECT = Path(__file__).resolve().parents[2]
SKIPPED, TIMEOUT, BROKEN = 77, 124, 125
EPILOG = f"""Exit codes: the command's own; {SKIPPED}: the machine cannot have the lab (the reason is the last line on
stderr); {TIMEOUT}: it took too long; {BROKEN}: the guest failed (its console is printed)."""
PASSED_ON = re.compile(r"(PATH|HOME|LANG|LC_\w+|TZ|TERM|VIRTUAL_ENV|(PYTHON|PYTEST_|NUMAGRAFT_)\w*)$")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the emulator goes too
    try:
        if options.action == "setup":
            _say(setup(options.cache, refresh=options.refresh))
            return 0
        if options.action == "list":
            for topology in TOPOLOGIES.values():
                print(f"{topology.name:18} {topology.summary}")
            return 0
        if options.action == "ci":
            return _ci(options)
        return max(_run(topology, options) for topology in _chosen(options))
    except Unavailable as reason:
        if getattr(options, "json", False) or not getattr(options, "command", True):
            print(json.dumps({"skipped": str(reason)}), flush=True)
        _say(f"skipped: {reason}")
        return SKIPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__, epilog=EPILOG)
    parser.add_argument("--cache", type=lambda text: Cache(Path(text)), default=Cache.default(), metavar="DIR")
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("setup", help="install the emulator, download the kernel")
    prepare.add_argument("--refresh", action="store_true", help="download again although the cache is filled")
    actions.add_parser("list", help="the topologies")
    actions.add_parser("ci", help="set up, then this project's tests on " + ", ".join(CI_TOPOLOGIES))
    run = actions.add_parser("run", help="boot and run a command", epilog=EPILOG)
    run.add_argument("--nodes", type=int, metavar="N", help="the plain topology of N nodes (1, 2, 4 or 8)")
    run.add_argument(
        "--topology", action="append", choices=[*TOPOLOGIES, "all"], metavar="NAME", help="one of `list`, or all"
    )
    run.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="boot included; default 600")
    run.add_argument("--accel", choices=["tcg", "kvm"], default="tcg", help="default tcg: works everywhere, slowly")
    run.add_argument("--append", default="", metavar="ARGUMENTS", help="more kernel arguments")
    run.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="for the command; repeatable")
    run.add_argument("--pytest", default="", metavar="ARGUMENTS", help="more arguments for the default command: --pytest='-m slow'")
    run.add_argument("--json", action="store_true", help="a summary as the last line also for a COMMAND of your own")
    run.add_argument("--console", action="store_true", help="show the guest kernel's messages")
    run.add_argument("command", nargs="*", metavar="COMMAND", help="after --; default: pytest on tests/numa")
    return parser


def _ci(options: argparse.Namespace) -> int:
    """Runs them all and fails if one does; where the machine cannot have the lab, exit code 0 and the reason in the last line."""
    passed: list[str] = []
    failed: dict[str, int] = {}
    try:
        _say(setup(options.cache))
        for name in CI_TOPOLOGIES:
            _check_memory(TOPOLOGIES[name])
            run = _parser().parse_args(
                ["--cache", str(options.cache.root), "run", "--topology", name, "--timeout", str(CI_SECONDS)]
            )
            code = _run(TOPOLOGIES[name], run)
            if code:
                failed[name] = code
            else:
                passed.append(name)
    except Unavailable as reason:
        _say(f"skipped: {reason}")
        if not failed:
            return 0
    if failed:
        _say(f"failed on {', '.join(f'{name} (exit code {code})' for name, code in failed.items())}")
        return max(failed.values())
    _say(f"passed on {', '.join(passed)}")
    return 0


def _check_memory(topology: Topology) -> None:
    """Raises Unavailable where the guest's memory would be the machine's last."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    needed = sum(node.mib for node in topology.nodes if node.present) + SPARE_MIB
    if found and int(found.group(1)) >> 10 < needed:
        raise Unavailable(
            f"{topology.name} needs {needed} MiB of memory and {int(found.group(1)) >> 10} MiB are available; free some"
        )


def _chosen(options: argparse.Namespace) -> list[Topology]:
    if options.nodes is not None and options.topology:
        raise SystemExit("lab: give --nodes or --topology, not both")
    if options.topology:
        names = list(TOPOLOGIES) if "all" in options.topology else options.topology
        return [TOPOLOGIES[name] for name in names]
    nodes = 2 if options.nodes is None else options.nodes
    topology = with_nodes(nodes)
    if topology is None:
        raise SystemExit(f"lab: no topology of {nodes} nodes; there are 1, 2, 4 and 8, and those of `list`")
    return [topology]


def _run(topology: Topology, options: argparse.Namespace) -> int:
    own_tests = not options.command
    command = options.command or _default_command(options.pytest)
    environment = {key: value for key, value in os.environ.items() if PASSED_ON.match(key)}
    environment |= dict(pair.split("=", 1) for pair in options.env)
    environment["NUMAGRAFT_LAB"] = topology.name
    tail = bytearray()

    def output(stream: str, chunk: bytes) -> None:
        target = sys.stdout if stream == "stdout" else sys.stderr
        target.buffer.write(chunk)
        target.buffer.flush()
        if stream == "stdout":
            tail.extend(chunk)
            del tail[:-4096]

    def attempt() -> machine.Outcome:
        return machine.run(
            topology,
            command,
            cache=options.cache,
            environment=environment,
            directory=str(PROJECT) if own_tests else None,
            accelerator=options.accel,
            timeout=options.timeout,
            kernel_arguments=options.append,
            output=output,
        )

    _say(f"{topology.name}: {topology.summary}")
    try:
        try:
            outcome = attempt()
        except machine.GuestNotUp as error:  # nothing ran yet: a second boot can hide no failure of what was to run
            _say(f"{topology.name}: {error}\nonce more")
            outcome = attempt()
    except machine.GuestError as error:
        _say(f"{topology.name}: {error}")
        return TIMEOUT if isinstance(error, machine.GuestTimeout) else BROKEN
    if options.console:
        _say(outcome.console)
    counts = _counts(tail.decode(errors="replace"))
    code = outcome.exit_code
    if own_tests and code == 0 and not counts.get("passed"):
        _say("no test ran: that is a failure too")
        code = 1
    start, seconds = round(outcome.start_seconds, 2), round(outcome.seconds, 2)
    _say(f"{topology.name}: exit code {code}, command started after {start} s, {seconds} s in all")
    if own_tests or options.json:
        summary = {"topology": topology.name, "nodes": len(topology.online), "exit_code": code}
        print(json.dumps({**summary, "start_seconds": start, "seconds": seconds, **counts}), flush=True)
    return code


def _default_command(more: str) -> list[str]:
    # Only the one plugin that the configuration needs: starting Python is some 30 times slower in the guest. What hangs
    # is named by its stack before the guest's own time limit ends it without a word.
    return [
        "env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", sys.executable, "-m", "pytest", "tests/numa",
        "-p", "pytest_timeout", "-p", "no:cacheprovider", "-m", "numa and not slow", "--durations=5",
        "--timeout=120", "-o", "faulthandler_timeout=90", *shlex.split(more),
    ]  # fmt: skip


def _counts(text: str) -> dict[str, int]:
    """`passed`, `failed`, `skipped`... from pytest's last line."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    pairs = re.findall(r"(\d+) ([a-z]+)", lines[-1].split(" in ")[0]) if lines else []
    return {kind: int(number) for number, kind in pairs}


def _say(message: str) -> None:
    sys.stdout.flush()
    print(f"lab: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
