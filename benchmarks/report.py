"""How every benchmark prints: tables for people unless `--json`, and always one JSON object as the last line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under a title; numbers are right-aligned and shortened to four significant digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def number(value: Any) -> str:
    """A cell as a person wants to read it: integers with separators, floats with four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def emit(result: Mapping[str, Any], tables: Sequence[Table] = (), *, as_json: bool) -> None:
    """Prints `tables` (or the result itself as one) unless `as_json`, then `result` as one line of JSON."""
    if not as_json:
        from rich.console import Console
        from rich.table import Table as RichTable

        plain = [(key, value) for key, value in result.items() if not isinstance(value, (dict, list))]
        console = Console()
        for table in tables or [Table("result", ("name", "value"), plain)]:
            drawn = RichTable(title=table.title, title_justify="left")
            for index, column in enumerate(table.columns):
                numeric = all(isinstance(row[index], (int, float, type(None))) for row in table.rows)
                drawn.add_column(column, justify="right" if numeric else "left")
            for row in table.rows:
                drawn.add_row(*(number(cell) for cell in row))
            console.print(drawn)
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    sys.stdout.flush()
