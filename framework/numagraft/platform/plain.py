"""Frozen dataclasses to plain JSON data and back, checked against their annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from numagraft.errors import Problem

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers, None: what json.dumps takes without help."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], data: Any, problems: list[Problem], where: str = "") -> T | None:
    """The dataclass that `to_plain` wrote; every mismatch is added to `problems`, and then the result means nothing."""
    if not isinstance(data, Mapping):
        problems.append(Problem(where, f"expected an object, found {_name(data)}"))
        return None
    hints = typing.get_type_hints(kind)
    values = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{item.name}" if where else item.name
        if item.name in data:
            values[item.name] = _read(hints[item.name], data[item.name], problems, place)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(Problem(place, "is missing"))
    unknown = sorted(set(data) - {item.name for item in dataclasses.fields(kind)})  # type: ignore[arg-type]
    problems.extend(Problem(f"{where}.{name}" if where else str(name), "is not a known field") for name in unknown)
    return None if problems else kind(**values)


def _read(hint: Any, data: Any, problems: list[Problem], where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _read(hint, data, problems, where)
    if origin is tuple:
        if not isinstance(data, list):
            problems.append(Problem(where, f"expected a list, found {_name(data)}"))
            return ()
        return tuple(_read(arguments[0], item, problems, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is typing.Literal:
        if not any(type(data) is type(word) and data == word for word in arguments):
            problems.append(Problem(where, f"expected one of {', '.join(map(str, arguments))}, found {_name(data)}"))
        return data
    if origin is not None and issubclass(origin, Mapping):
        numbers = arguments[0] is int
        if not isinstance(data, Mapping) or (numbers and not all(_is_number(key) for key in data)):
            problems.append(Problem(where, "expected an object" + (" with numbers as keys" if numbers else "")))
            return {}
        read = {key: _read(arguments[1], item, problems, f"{where}.{key}") for key, item in data.items()}
        return {int(key): item for key, item in read.items()} if numbers else read
    if hint is Any:
        return data
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, data, problems, where)  # type: ignore[arg-type]
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, hint) or (hint is int and isinstance(data, bool)):
        problems.append(Problem(where, f"expected {hint.__name__}, found {_name(data)}"))
    return data


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 18


def _name(data: Any) -> str:
    return "null" if data is None else f"{type(data).__name__} {str(data)[:40]!r}"
