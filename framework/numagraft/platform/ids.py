"""The kernel's ways to write sets of small numbers: lists ("0-3,8") and masks ("00000000,0000000f")."""

from __future__ import annotations

from collections.abc import Iterable

#: Above any NR_CPUS or MAX_NUMNODES a kernel is built with; a larger number in a file is damage, not a machine.
MAX_ID = 1 << 16


def parse_list(text: str | None) -> tuple[int, ...] | None:
    """The numbers of a list such as "0-3,8", or with strides "0-6:2/4", sorted; None for text that is no such list.

    An empty text is the empty set, as in `has_cpu` of a machine whose nodes have no CPUs.
    """
    if text is None:
        return None
    found: set[int] = set()
    for item in text.replace("\n", " ").replace(" ", ",").split(","):
        if not item:
            continue
        span, _, stride = item.partition(":")
        first, dash, last = span.partition("-")
        used, slash, group = stride.partition("/")
        numbers = [first, *([last] if dash else []), *([used, group] if slash else [])]
        if not all(number.isascii() and number.isdigit() and len(number) <= 6 for number in numbers):
            return None
        if stride and not slash:
            return None
        begin, end = int(first), int(last) if dash else int(first)
        if begin > end or end >= MAX_ID:
            return None
        if slash:
            if int(group) == 0 or int(used) > int(group):
                return None
            found.update(n for n in range(begin, end + 1) if (n - begin) % int(group) < int(used))
        else:
            found.update(range(begin, end + 1))
    return tuple(sorted(found))


def parse_mask(text: str | None) -> tuple[int, ...] | None:
    """The numbers of a mask such as "00000000,0000000f" (groups of 32 bits, highest first); None for other text."""
    if text is None:
        return None
    groups = text.strip().split(",")
    if len(groups) * 32 > MAX_ID or not all(group and len(group) <= 16 for group in groups):
        return None
    if not all(character in "0123456789abcdefABCDEF" for group in groups for character in group):
        return None
    if len(groups) == 1:
        bits = int(groups[0], 16)
    else:
        if not all(len(group) <= 8 for group in groups):
            return None
        bits = 0
        for group in groups:
            bits = bits << 32 | int(group, 16)
    # Byte by byte: shifting one number of 65536 bits bit by bit would be quadratic.
    found = []
    for index, byte in enumerate(bits.to_bytes((bits.bit_length() + 7) // 8, "little")):
        if byte:
            found.extend(index * 8 + bit for bit in range(8) if byte >> bit & 1)
    return tuple(found)


def format_list(numbers: Iterable[int]) -> str:
    """The shortest list in the kernel's notation: (0, 1, 2, 5) -> "0-2,5"."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def parse_int(text: str | None) -> int | None:
    """A decimal integer of at most 20 digits, with blanks around it; None for other text."""
    if text is None:
        return None
    text = text.strip()
    digits = text[1:] if text[:1] in "+-" else text
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        return None
    return int(text)
