"""What fuzzing found stays found: every input in `found/` and every seed is taken or refused, never more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import targets

FOUND = sorted(path for path in (Path(__file__).parent / "found").rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_an_input_that_was_found(path):
    targets.run(targets.TARGETS[path.parent.name], path.read_bytes())


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds(name):
    seeds = targets.seeds(name)
    assert seeds
    for data in seeds:
        targets.run(targets.TARGETS[name], data)


def test_what_counts_as_a_finding(monkeypatch):
    def wrong(data: bytes) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        targets.run(wrong, b"")
    monkeypatch.setattr(targets, "MAX_SECONDS", -1.0)
    with pytest.raises(targets.SlowInput):
        targets.run(lambda data: None, b"")


def test_one_pause_is_no_finding(monkeypatch):
    seconds = iter([5.0, 0.1, 5.0])
    monkeypatch.setattr(targets, "_seconds", lambda target, data: next(seconds))
    targets.run(lambda data: None, b"")
    seconds = iter([5.0, 3.0, 5.0])
    with pytest.raises(targets.SlowInput, match=r"3\.0 s"):
        targets.run(lambda data: None, b"")
