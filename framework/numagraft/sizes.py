"""Amounts of memory as people write them: "64GiB". Imports nothing of numagraft."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1 << 10 * power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
}
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?\s*([A-Za-z]{0,3})")

EXPECTED = 'a number of bytes, or a size such as "64GiB", "1.5TiB" or "512MB"'


def parse_size(value: object) -> int:
    """Bytes of an int or of a text with a unit (GiB = 2^30, GB = 10^9).

    Raises ValueError with what was expected.

    >>> parse_size("1.5GiB")
    1610612736
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is negative; expected {EXPECTED}")
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[3].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no size; expected {EXPECTED}")
    unit = _UNITS[match[3].lower()]
    digits = match[2] or ""
    # In whole numbers: floating point would round large sizes.
    return (int(match[1] + digits) * unit) // 10 ** len(digits)


def format_size(count: int | float) -> str:
    """Three significant digits in binary units.

    >>> format_size(1610612736)
    '1.50 GiB'
    """
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            break
        amount /= 1024
    if unit == "B":
        return f"{int(amount)} B"
    digits = 2 if abs(amount) < 10 else 1 if abs(amount) < 100 else 0
    return f"{amount:.{digits}f} {unit}"
