"""Reading files: shared large reads, and the ranges that were read as they grow together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from numagraft.checkpoints import files
from numagraft.checkpoints.files import Intervals, UncachedFile
from numagraft.errors import CheckpointError

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=25)


@given(ranges)
def test_they_cover_what_was_added_and_nothing_else(added: list[tuple[int, int]]) -> None:
    intervals = Intervals()
    covered: set[int] = set()
    for begin, length in added:
        intervals.add(begin, begin + length)
        covered.update(range(begin, begin + length))
        found = list(intervals)
        assert {at for begin_, end in found for at in range(begin_, end)} == covered
        assert all(first[1] < second[0] for first, second in pairwise(found))


@given(ranges, ranges)
def test_only_what_has_grown_is_told(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    intervals = Intervals()
    for begin, length in first:
        intervals.add(begin, begin + length)
    assert intervals.take_grown() == list(intervals)
    assert intervals.take_grown() == []
    for begin, length in second:
        intervals.add(begin, begin + length)
    grown = intervals.take_grown()
    touched = {(b, e) for b, e in intervals if any(b <= begin and begin + length <= e for begin, length in second)}
    assert set(grown) == touched


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 20) - 1, (1 << 20) + 1, (5 << 20) + 12345])
def test_large_reads_are_shared_and_whole(
    tmp_path: Path, readers: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_READERS", readers)
    content = torch.randint(0, 256, (size + 20,), dtype=torch.uint8)
    (tmp_path / "f").write_bytes(content.numpy().tobytes())
    file = UncachedFile(tmp_path / "f")
    assert torch.equal(file.read_tensor(torch.empty(size, dtype=torch.uint8), 13), content[13 : size + 13])
    with pytest.raises(CheckpointError, match="truncated"):
        file.read_tensor(torch.empty(size + 8, dtype=torch.uint8), 13)
    file.close()
    with pytest.raises(CheckpointError, match="closed"):
        file.read_tensor(torch.empty(1, dtype=torch.uint8), 0)
