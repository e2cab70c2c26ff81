"""The console that commands print tables and reports to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

UNKNOWN_WIDTH = 140
"""Columns where the output is no terminal: rich would take 80, which breaks module names in logs, files and pipes."""


def open_console(*, stderr: bool = False, **settings: Any) -> Console:
    """As wide as the terminal (or as COLUMNS says); `UNKNOWN_WIDTH` in a pipe or a file."""
    from rich.console import Console

    console = Console(stderr=stderr, **settings)
    if not console.file.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        console = Console(stderr=stderr, width=UNKNOWN_WIDTH, **settings)
    return console
