"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "advice", "hurts"]

SEVERITIES: tuple[Severity, ...] = ("hurts", "advice", "note")


@dataclass(frozen=True)
class Finding:
    """`hurts`: placement or speed is lost until it is mended; `advice`: could be better; `note`: worth knowing.

    `topic` is a short stable name for scripts ("numa-balancing"); `remedy` is what to do, a command where there is one.
    """

    severity: Severity
    topic: str
    found: str
    remedy: str = ""
