"""Collects what is wrong with rules, each with its place, and raises it all at once in file order. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

from numagraft.errors import NumagraftError, Problem, RuleError
from numagraft.rulefile.rules import Location

#: past this many the rest is counted, not listed: a generated file may be wrong on every line
SHOWN = 100


class Problems:
    """Every offender of one reading; `raise_if_any` reports them sorted by file (in order of first use), line, column."""

    def __init__(self) -> None:
        self._found: list[tuple[Location, Problem]] = []
        self._known: set[tuple[Location, Problem]] = set()
        self._files: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, location: Location, message: str, hint: str = "") -> None:
        self._files.setdefault(location.file, len(self._files))
        entry = (location, Problem(str(location), message, hint))
        if entry not in self._known:
            self._known.add(entry)
            self._found.append(entry)

    def absorb(self, other: Problems) -> None:
        """Takes over what `other` found."""
        for location, problem in other._found:
            self.add(location, problem.message, problem.hint)

    def sorted(self) -> list[Problem]:
        def key(entry: tuple[Location, Problem]) -> tuple[int, int, int]:
            return self._files[entry[0].file], entry[0].line, entry[0].column

        return [problem for _, problem in sorted(self._found, key=key)]

    def raise_if_any(self, subject: str, error: type[NumagraftError] = RuleError) -> None:
        if not self._found:
            return
        found = self.sorted()
        shown = found[:SHOWN]
        if len(found) > SHOWN:
            shown.append(Problem("", f"... and {len(found) - SHOWN} more"))
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise error(f"{subject}: {count}", shown)


def did_you_mean(found: str, known: Iterable[str], *, otherwise: str = "known") -> str:
    """A hint naming the closest of `known`, or all of them when none is close."""
    return _did_you_mean(found[:100], tuple(sorted(known)), otherwise)


@lru_cache(1024)  # a generated file may be wrong the same way on every line
def _did_you_mean(found: str, known: tuple[str, ...], otherwise: str) -> str:
    close = difflib.get_close_matches(found, known, n=2, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    if not known:
        return f"{otherwise}: none"
    shown = ", ".join(known[:16])
    return f"{otherwise}: {shown}{', ...' if len(known) > 16 else ''}"
