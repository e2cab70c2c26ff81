"""The `numagraft` command: one module per subcommand, errors without tracebacks, exit codes for scripts.

Exit codes: 0 fine; 1 a check failed (placement not as asked, a doctor finding that hurts); 2 bad usage or input.
"""

from __future__ import annotations

import importlib
import os
import sys

import typer

from numagraft import __version__
from numagraft.errors import NumagraftError, PlacementError

COMMANDS = ("run", "plan", "doctor", "explain", "lint", "rules", "bench")

app = typer.Typer(
    name="numagraft",
    help="Graft NUMA-aware operators onto Hugging Face models, with placement that is proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def exit_code(error: BaseException) -> int:
    """1 where a check failed, 2 where the input was wrong."""
    return 1 if isinstance(error, PlacementError | MemoryError) else 2


def run() -> None:
    """Entry point of the console script."""
    # Before torch loads: its OpenMP workers spin 4-6 ms after each parallel region, on the cores our threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for command in COMMANDS:
        importlib.import_module(f"numagraft.cli.{command}_command").register(app)
    try:
        app()
    except NumagraftError as error:
        typer.echo(f"numagraft: {error}", err=True)
        sys.exit(exit_code(error))
    except MemoryError as error:
        typer.echo(f"numagraft: out of memory: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("numagraft: interrupted", err=True)
        sys.exit(130)
