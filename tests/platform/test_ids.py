from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numagraft.platform.ids import MAX_ID, format_list, parse_int, parse_list, parse_mask


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", ()),
        ("0", (0,)),
        ("0-3,8\n", (0, 1, 2, 3, 8)),
        ("0-15:1/4", (0, 4, 8, 12)),
        ("1,3 5", (1, 3, 5)),
        ("2,0-1,1", (0, 1, 2)),
    ],
)
def test_lists(text, numbers):
    assert parse_list(text) == numbers


@pytest.mark.parametrize(
    "text", [None, "a", "3-1", "-1", "1-", "0-65536", "1-2:3", "0-4:3/2", "0-4:0/0", "٣", "1.5", "0-9999999"]
)
def test_no_lists(text):
    assert parse_list(text) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("00000000,0000000f", (0, 1, 2, 3)),
        ("1,00000000", (32,)),
        ("80000000", (31,)),
        ("ffffffffffffffff", tuple(range(64))),
        ("0", ()),
    ],
)
def test_masks(text, numbers):
    assert parse_mask(text) == numbers


@pytest.mark.parametrize("text", [None, "", "x", "1,", "0x1", "-1", ",".join(["0"] * 2049), "123456789,0", "_1"])
def test_no_masks(text):
    assert parse_mask(text) is None


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5), (" -3\n", -3), ("", None), ("1_0", None), ("٣", None), ("9" * 21, None)]
)
def test_integers(text, number):
    assert parse_int(text) == number


numbers = st.sets(st.integers(0, MAX_ID - 1), max_size=200)


@given(numbers)
def test_lists_survive_a_round_trip(chosen):
    assert parse_list(format_list(chosen)) == tuple(sorted(chosen))


@given(numbers)
def test_masks_say_what_lists_say(chosen):
    bits = sum(1 << number for number in chosen)
    groups = [f"{bits >> 32 * i & 0xFFFFFFFF:08x}" for i in range(max(chosen, default=0) // 32 + 1)]
    assert parse_mask(",".join(reversed(groups))) == tuple(sorted(chosen))


@given(st.text(max_size=30))
def test_any_text_is_a_list_or_none(text):
    for parse in (parse_list, parse_mask):
        found = parse(text)
        assert found is None or all(0 <= number < MAX_ID for number in found)
