"""`numagraft doctor`: what this machine is, what on it would hurt, and what to do about it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from numagraft.cli.console import open_console

if TYPE_CHECKING:
    from numagraft.doctor import Measurement
    from numagraft.platform import Platform

#: When measuring should be over, and the least time it gets.
_ENDS_AFTER_SECONDS, _LEAST_SECONDS = 14.0, 3.0


def doctor(
    fsroot: Annotated[
        Path, typer.Option(help="Judge another machine: a folder or archive with its /sys and /proc, or a .json.")
    ] = Path("/"),
    measured: Annotated[
        bool, typer.Option("--measure", help="Measure read bandwidth and latency of all pairs of nodes (up to 20 s).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with findings and platform.")] = False,
) -> None:
    """Judge this machine. Exit code 1 when something would hurt placement or speed."""
    from numagraft.doctor import Circumstances, diagnose
    from numagraft.platform import Platform

    platform = Platform.detect() if str(fsroot) == "/" else Platform.from_dump(fsroot)
    measurement = _measure(platform, quiet=as_json) if measured else None
    diagnosis = diagnose(Circumstances.of(platform), measurement=measurement)
    if as_json:
        typer.echo(diagnosis.to_json())
    else:
        open_console().print(diagnosis, highlight=False)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _measure(platform: Platform, *, quiet: bool) -> Measurement:
    from numagraft.doctor import measure

    console = open_console(stderr=True, quiet=quiet)
    with console.status("measuring") as status:
        # Starting up counts too: on a slow machine that alone takes seconds.
        budget = max(_LEAST_SECONDS, _ENDS_AFTER_SECONDS - _process_age())
        measurement = measure(
            platform, budget_seconds=budget, progress=lambda text: status.update(f"measuring: {text}")
        )
    try:
        path = measurement.save()
    except OSError as error:
        console.print(f"cannot be kept for planning: {error}", highlight=False)
    else:
        console.print(f"measured in {measurement.seconds:.0f} s; kept for planning in {path}", highlight=False)
    return measurement


def _process_age() -> float:
    """Seconds since this process began; 0 where the kernel does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
