"""Name patterns: regular expressions over qualified module names, from files that may come from a stranger. No torch.

Names are matched whole. One scan per pattern runs over all names joined by newlines, through `regex` with a timeout: a call
per name would cost several times more. A pattern that could look past a newline is matched name by name instead.
"""

from __future__ import annotations

import bisect
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import regex

MAX_LENGTH = 2_000
#: seconds of processor time that one pattern may take over all names of a model
TIMEOUT = 0.4

# what a pattern may hold for the joined scan to be exact: nothing in it can match, or see, a newline
_LINE_SAFE = re.compile(
    r"""(?: \\[wdSb.\-_()\[\]{}+*?^$|/\\]          # escapes that never match a newline (\D, \W, \s would)
          | \[(?:[A-Za-z0-9_.]|\\[wd.\-]|(?<=[a-z0-9A-Z])-(?=[a-z0-9A-Z]))+\]    # classes of name characters
          | \[\^\\n(?:[A-Za-z0-9_.]|\\[wd.\-]|(?<=[a-z0-9A-Z])-(?=[a-z0-9A-Z]))+\]
          | \(\?(?:[:=!>]|<[=!]|P<\w+>|i\))
          | \((?!\?)
          | [^\\\[\](\n]
        )*""",
    re.VERBOSE,
)


class PatternError(ValueError):
    """A pattern that cannot be used; `position` is the offending character's index, where known."""

    def __init__(self, message: str, hint: str = "", position: int | None = None) -> None:
        self.message, self.hint, self.position = message, hint, position
        super().__init__(message)


class PatternTimeout(Exception):
    """The pattern took longer than it may."""


@dataclass(frozen=True)
class Names:
    """A model's names, joined once for every pattern's scan."""

    names: tuple[str, ...]
    joined: str = field(repr=False)
    starts: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        starts, at = [], 0
        for name in names:
            starts.append(at)
            at += len(name) + 1
        return cls(tuple(names), "\n".join(names), tuple(starts))

    def at(self, offset: int) -> int:
        """The index of the name that holds character `offset` of the joined text."""
        return bisect.bisect_right(self.starts, offset) - 1


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern. `line_safe` tells whether the joined scan finds exactly the whole-name matches."""

    text: str
    _rewritten: str
    line_safe: bool

    @classmethod
    def compile(cls, text: str) -> NamePattern:
        """Raises PatternError when the pattern is too long or no regular expression."""
        if len(text) > MAX_LENGTH:
            raise PatternError(f"a pattern of {len(text):,} characters", f"a pattern may have {MAX_LENGTH:,}")
        if "\n" in text:
            raise PatternError("a pattern with a line break", "module names have none: write the pattern on one line")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(text)
        except re.error as error:
            hint = "a literal dot is \\. and everything else of a name is literal"
            if text.startswith("*"):
                hint = f"this is a shell pattern; the regular expression is '.{text}'"
            raise PatternError(f"bad regular expression: {error.msg}", hint, error.pos) from None
        except (OverflowError, RecursionError) as error:
            raise PatternError(f"bad regular expression: {error}", "simplify it") from None
        fuzzy = re.search(r"\{[^0-9,}][^}]*\}", text)
        if fuzzy and (fuzzy.start() == 0 or text[fuzzy.start() - 1] != "\\"):
            raise PatternError(
                "bad regular expression: braces that are no count", "escape a literal brace: \\{", fuzzy.start()
            )
        rewritten = _exclude_newline(text)
        try:
            pattern = regex.compile(rewritten)
        except (regex.error, OverflowError, RecursionError) as error:
            position = getattr(error, "pos", None)
            raise PatternError(f"bad regular expression: {getattr(error, 'msg', error)}", "simplify it", position) from None
        del pattern
        return cls(text, rewritten, _LINE_SAFE.fullmatch(rewritten) is not None)

    @cached_property
    def _whole(self) -> Any:
        return regex.compile(self._rewritten)

    @cached_property
    def _lines(self) -> Any:
        return regex.compile(f"(?m)^(?:{self._rewritten})$")

    def fullmatch(self, name: str, *, timeout: float = TIMEOUT) -> bool:
        """Raises PatternTimeout."""
        try:
            return self._whole.fullmatch(name, timeout=timeout) is not None
        except TimeoutError:
            raise PatternTimeout(self.text) from None

    def search(self, name: str, *, timeout: float = TIMEOUT) -> bool:
        """Whether it matches anywhere in the name, for explanations. Raises PatternTimeout."""
        try:
            return self._whole.search(name, timeout=timeout) is not None
        except TimeoutError:
            raise PatternTimeout(self.text) from None

    def scan(self, names: Names, *, timeout: float = TIMEOUT) -> list[int]:
        """Indices of the names that match whole, in order. Raises PatternTimeout."""
        if not names.names:
            return []
        deadline = time.monotonic() + timeout
        if not self.line_safe:
            found = []
            for index, name in enumerate(names.names):
                if self.fullmatch(name, timeout=max(deadline - time.monotonic(), 1e-4)):
                    found.append(index)
                if time.monotonic() > deadline:
                    raise PatternTimeout(self.text)
            return found
        try:
            hits = [names.at(hit.start()) for hit in self._lines.finditer(names.joined, timeout=timeout)]
        except TimeoutError:
            raise PatternTimeout(self.text) from None
        # the scan decides which names are worth a full match; the full match decides
        found = []
        for index in hits:
            if self.fullmatch(names.names[index], timeout=timeout):
                found.append(index)
            if time.monotonic() > deadline:
                raise PatternTimeout(self.text)
        return found


def _exclude_newline(text: str) -> str:
    """The pattern with every negated class `[^...]` made to exclude the newline too; the same for names, which have none."""
    out: list[str] = []
    index, inside = 0, False
    while index < len(text):
        character = text[index]
        if character == "\\":
            out.append(text[index : index + 2])
            index += 2
            continue
        if inside:
            inside = character != "]"
            out.append(character)
        elif character == "[":
            inside = True
            out.append("[")
            if text[index + 1 : index + 2] == "^":
                out.append("^\\n")
                index += 1
            if text[index + 1 : index + 2] == "]":  # a bracket right after the opening one is literal
                out.append("\\]")
                index += 1
        else:
            out.append(character)
        index += 1
    return "".join(out)
