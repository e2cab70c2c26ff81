"""Comparisons as rules write them: ">=2", ">=512,<4096", 48. No torch."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
    "": operator.eq,
}
_TERM = re.compile(r"\s*(>=|<=|==|!=|>|<|=|)\s*(-?[0-9]{1,18})\s*")

EXPECTED = 'a number or a comparison in quotes, such as ">=2" or ">=512,<4096"'


@dataclass(frozen=True)
class Comparison:
    """Every term must hold. `text` is the comparison as written."""

    text: str
    terms: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, value: object) -> Comparison | None:
        """None when `value` is no comparison."""
        if isinstance(value, bool) or not isinstance(value, int | str):
            return None
        terms = []
        for part in str(value).split(","):
            match = _TERM.fullmatch(part)
            if match is None:
                return None
            terms.append((match[1] if match[1] not in ("", "=") else "==", int(match[2])))
        return cls(str(value), tuple(terms))

    def holds(self, number: int) -> bool:
        return all(_OPERATORS[symbol](number, bound) for symbol, bound in self.terms)

    def __str__(self) -> str:
        return self.text
