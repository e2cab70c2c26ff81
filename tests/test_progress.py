"""Progress: bytes that only grow, a bar on request, and transformers' own bar out of the way."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from numagraft.progress import Meter, shown, transformers_bar_hidden


def test_a_meter_never_counts_past_its_total() -> None:
    calls: list[tuple[int, int, str]] = []
    meter = Meter(lambda *call: calls.append(call), 10)
    meter.add(4, "a")
    meter.add(5, "b")
    meter.add(5, "c")
    assert calls == [(4, 10, "a"), (9, 10, "b"), (10, 10, "c")]
    Meter(None, 10).add(3, "nobody listens")


def test_what_shown_gives() -> None:
    def callback(done: int, total: int, name: str) -> None: ...

    for quiet in (None, False):
        with shown(quiet) as progress:
            assert progress is None
    with shown(callback) as progress:
        assert progress is callback


def test_a_bar_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True) as progress:
        progress(1 << 20, 1 << 20, "model.layers.0.weight")
    printed = capsys.readouterr()
    assert printed.out == "" and "1.0/1.0 MiB" in printed.err and "model.layers.0.weight" in printed.err


@pytest.mark.parametrize("enabled", [True, False])
def test_the_bar_of_transformers_comes_back_as_it_was(enabled: bool) -> None:
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        with transformers_bar_hidden():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is enabled
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
