from __future__ import annotations

import doctest

import pytest

from numagraft import placement, sizes
from numagraft.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        ("0", 0),
        ("64GiB", 64 << 30),
        ("64 gib", 64 << 30),
        ("1GB", 10**9),
        ("0.5TiB", 1 << 39),
        ("512b", 512),
        ("999999999999999999", 999999999999999999),
    ],
)
def test_parse_size(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "value", ["", "GiB", "-1GiB", "1e3", "1_000", "1 GiB 2", "64XB", "٣GiB", "0x10", True, None, 1.5, -1, []]
)
def test_parse_size_refuses(value):
    with pytest.raises(ValueError, match="expected a number of bytes"):
        parse_size(value)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (64 << 30, "64.0 GiB"), (5 << 50, "5120 TiB")]
)
def test_format_size(count, text):
    assert format_size(count) == text


@pytest.mark.parametrize("module", [sizes, placement])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
