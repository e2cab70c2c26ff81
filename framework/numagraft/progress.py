"""How far loading is: a callback of bytes done, bytes in all, and the name that was just taken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], Any]


class Meter:
    """Counts bytes and tells the callback; never counts past the total."""

    def __init__(self, callback: Progress | None, total_bytes: int) -> None:
        self._callback = callback
        self.total_bytes = total_bytes
        self.done_bytes = 0

    def add(self, count: int, name: str) -> None:
        self.done_bytes = min(self.done_bytes + count, self.total_bytes)
        if self._callback is not None:
            self._callback(self.done_bytes, self.total_bytes, name)


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """The callback to use: the caller's own, none, or (for True) a bar on standard error while the context lasts."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
        with Bar(*columns, TextColumn("{task.fields[name]}"), console=Console(file=sys.stderr)) as bar:
            task = bar.add_task("loading", total=None, name="")
            yield lambda done, total, name: bar.update(task, completed=done, total=total, name=name[-44:])
    else:
        yield progress


@contextmanager
def transformers_bar_hidden() -> Iterator[None]:
    """transformers draws its own bar, which counts parameters; ours counts bytes."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
