"""A rule's kwargs against what its operator declares: typed, no coercion, every problem at its place. No torch."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from numagraft.errors import ConfigurationError
from numagraft.placement import PlacementSpec, parse
from numagraft.rulefile.nodes import describe_value
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import Location, Rule

_WRONG: Any = object()


def build_params(params_class: type, rule: Rule, problems: Problems) -> Any:
    """An instance of `params_class` (an operator's Params) from the rule's kwargs; None when a problem was added."""
    return build(params_class, rule.replace.kwargs, rule, problems)


def build(params_class: type, kwargs: Mapping[str, Any], rule: Rule, problems: Problems) -> Any:
    hints = get_type_hints(params_class)
    fields = {field.name: field for field in dataclasses.fields(params_class) if field.init}
    operator = rule.replace.operator
    values: dict[str, Any] = {}
    before = len(problems)
    for key, value in kwargs.items():
        place = _place(rule, key)
        if key not in fields:
            hint = did_you_mean(key, fields, otherwise=f"kwargs of {operator}")
            problems.add(place, f"{operator} takes no kwarg {key!r}", hint)
            continue
        found = _value(hints[key], value, place, f"{operator}: {key}", problems)
        if found is not _WRONG:
            values[key] = found
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in kwargs:
            hint = f"add {key}: {expected(hints[key])}"
            problems.add(rule.mark("replace.kwargs"), f"{operator} needs the kwarg {key!r}", hint)
    if len(problems) > before:
        return None
    return params_class(**values)


def _place(rule: Rule, key: str) -> Location:
    return rule.mark(f"replace.kwargs.{key}")


def _value(hint: Any, value: Any, place: Location, what: str, problems: Problems) -> Any:
    if hint is PlacementSpec:
        try:
            return parse(value)
        except ConfigurationError as error:
            for problem in error.problems:
                where = f"{problem.where}: " if problem.where and problem.where != "placement" else ""
                problems.add(place, f"{what.partition(':')[0]}: {where}{problem.message}", problem.hint)
            if not error.problems:
                problems.add(place, f"{what}: {error}")
            return _WRONG
    if _fits(hint, value):
        return tuple(value) if get_origin(hint) is tuple and isinstance(value, list) else value
    message = f"{what} is {describe_value(value)}, expected {expected(hint)}"
    problems.add(place, message, _hint(hint, value))
    return _WRONG


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in get_args(hint))
    if origin is tuple:
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(item, element) for element in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def expected(hint: Any) -> str:
    """What a kwarg of this type takes, for people."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in get_args(hint))
    if origin is tuple:
        return "a list"
    if hint is PlacementSpec:
        return "a placement"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _words(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) for word in _words(option)]


def _hint(hint: Any, value: Any) -> str:
    words = [str(word) for word in _words(hint)]
    if isinstance(value, str) and words:
        text = did_you_mean(value, words)
        if text.startswith("did"):
            return text
    if isinstance(value, bool) or hint is bool:
        return "" if isinstance(value, bool) else "true and false are the only booleans: yes, no, on and off are text"
    if isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return ""
