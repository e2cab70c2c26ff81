"""A progress bar for loading: bytes, speed, and the parameter that is being packed."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from rich.console import Console

    from numagraft.planning import Plan

_NAME_WIDTH = 44


class LoadingBar:
    """Called by the loader as `bar(done_bytes, total_bytes, name)`; a context manager that ends the bar's line."""

    def __init__(self, console: Console, *, shown: bool) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("loading"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[name]}"),
            console=console,
            disable=not shown,
        )
        self._task: int | None = None

    def show_plan(self, plan: Plan) -> None:
        """Prints the plan before anything is read."""
        self._console.print(plan.render())

    def __call__(self, done_bytes: int, total_bytes: int, name: str) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("load", total=total_bytes, name="")
        self._progress.update(self._task, completed=done_bytes, total=total_bytes, name=name[-_NAME_WIDTH:])

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()
