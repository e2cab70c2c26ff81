"""`numagraft doctor`: what this machine is, what on it would hurt, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    fsroot: Annotated[
        Path, typer.Option(help="Judge another machine: a folder or archive with its /sys and /proc, or a .json.")
    ] = Path("/"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with findings and platform.")] = False,
) -> None:
    """Judge this machine. Exit code 1 when something would hurt placement or speed."""
    from numagraft.doctor import Circumstances, diagnose
    from numagraft.platform import Platform

    platform = Platform.detect() if str(fsroot) == "/" else Platform.from_dump(fsroot)
    diagnosis = diagnose(Circumstances.of(platform))
    if as_json:
        typer.echo(diagnosis.to_json())
    else:
        from rich.console import Console

        Console().print(diagnosis, highlight=False)
    if not diagnosis.ok:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
