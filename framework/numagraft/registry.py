"""Which operators there are: a literal table plus the entry points of other packages, imported only when used."""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from numagraft.errors import ConfigurationError

if TYPE_CHECKING:
    from numagraft.contract import Operator

ENTRY_POINT_GROUP = "numagraft.operators"

OPERATORS: dict[str, str] = {
    "experts": "numagraft.operators.experts:Experts",
    "linear": "numagraft.operators.linear:Linear",
    "torch": "numagraft.operators.torch_operator:Torch",
}


@cache
def operator_table() -> dict[str, str]:
    """Every operator name and its "module:Class"; an entry point may add a name, never replace one of ours."""
    table = dict(OPERATORS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        table.setdefault(point.name, point.value)
    return table


def load_operator(name: str) -> type[Operator]:
    """The operator class registered under `name`.

    Raises ConfigurationError with close matches when there is none.
    """
    table = operator_table()
    if name not in table:
        close = difflib.get_close_matches(name, table, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"registered: {', '.join(sorted(table))}"
        raise ConfigurationError(f"no operator is registered as {name!r}; {hint}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def operator_class(name: str) -> type[Operator]:
    """A registered operator, or the class behind a dotted path: callers let one through only where code is trusted.

    Raises ConfigurationError when it cannot be imported or is no operator.
    """
    if not is_dotted(name):
        return load_operator(name)
    from numagraft.contract import Operator

    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"the class {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Operator)):
        raise ConfigurationError(f"{name!r} is no operator: it must be a subclass of numagraft.contract.Operator")
    return found


def is_dotted(name: str) -> bool:
    """Whether an operator is named by where its class is, not by a registered name."""
    return "." in name or ":" in name
