"""Plans as JSON, and back. Imports operators (for their Params) only when reading.

A plan file is data like a rule file, and may come from a stranger: it is checked field by field, names a class outside the
registry only where code is trusted, and carries a checksum, so that an edited one is told from one that was written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from numagraft.errors import ConfigurationError, PlanError, Problem
from numagraft.planning import Plan, PlannedModule, as_plain
from numagraft.platform.plain import from_plain
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import DEFAULT, Location, Match, Replace, Rule
from numagraft.sizes import format_size

SCHEMA = 2

#: a plan of 100,000 modules takes about half of this
MAX_BYTES = 64 << 20

#: written for readers of the JSON, computed again by whoever reads it as a plan
_DERIVED = ("schema", "sha256", "total_bytes", "prediction")

_SHOWN = 40


def dump(plan: Plan, *, indent: int | None = None) -> str:
    return json.dumps({"schema": SCHEMA, "sha256": checksum(plan), **to_plain(plan)}, indent=indent)


def to_plain(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; maps keyed by node have text keys, as JSON wants."""
    data = as_plain(plan)
    data["total_bytes"] = plan.total_bytes
    for module, planned in zip(data["modules"], plan.modules, strict=True):
        module["format"] = planned.format
    return data


def checksum(plan: Plan) -> str:
    """SHA-256 of everything in the plan."""
    return hashlib.sha256(json.dumps(as_plain(plan), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(path: str | Path, *, trust_code: bool = False) -> Plan:
    """The plan in a file of `Plan.to_json` or `numagraft plan --json`.

    Raises PlanError when it cannot be read or is no plan.
    """
    subject = f"the plan {path} cannot be used"
    try:
        file = Path(path).expanduser()
        if not file.is_file():
            raise PlanError(
                subject, [Problem("", "there is no such file", "`numagraft plan MODEL -o FILE` writes one")]
            )
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise PlanError(
                subject, [Problem("", f"it has {format_size(size)}, at most {format_size(MAX_BYTES)} are read")]
            )
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise PlanError(subject, [Problem("", f"it cannot be read: {error}")]) from error
    try:
        return load(text, trust_code=trust_code)
    except PlanError as error:
        raise PlanError(f"{subject}: {str(error).splitlines()[0]}", error.problems) from None


def load(text: str, *, trust_code: bool = False) -> Plan:
    """Raises PlanError when `text` is no plan, was changed after it was written, or names operators or kwargs that are not
    here; `trust_code` lets it name a class by its dotted path."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError("not a plan", [Problem("", f"not JSON: {error}")]) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise PlanError(
            "not a plan",
            [Problem("schema", f"expected {SCHEMA}, found {found!r}", "`numagraft plan --json` writes one")],
        )
    problems: list[Problem] = []
    fields = {key: value for key, value in data.items() if key not in _DERIVED}
    if isinstance(fields.get("modules"), list):
        fields["modules"] = [_without_format(module) for module in fields["modules"]]
    plan = from_plain(Plan, fields, problems)
    if problems or plan is None:
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(Problem("", f"and {len(problems) - _SHOWN} more"))
        raise PlanError("not a plan", shown)
    plan = replace(plan, modules=_with_params(plan.modules, trust_code))
    found, expected = data.get("sha256"), checksum(plan)
    if found != expected:
        raise PlanError(
            "not a plan that numagraft wrote",
            [
                Problem(
                    "sha256",
                    f"expected {expected[:16]}..., found {str(found)[:16]}...: the file was changed after it was written",
                    "change the rules instead, and plan again",
                )
            ],
        )
    return plan


def _without_format(module: Any) -> Any:
    if not isinstance(module, Mapping):
        return module
    return {key: value for key, value in module.items() if key != "format"}


def _with_params(modules: tuple[PlannedModule, ...], trust_code: bool) -> tuple[PlannedModule, ...]:
    """Params, checked like a rule's kwargs."""
    problems = Problems()
    found = tuple(replace(module, params=_params(module, trust_code, problems)) for module in modules)
    problems.raise_if_any("not a plan", PlanError)
    return found


def _params(module: PlannedModule, trust_code: bool, problems: Problems) -> Any:
    from numagraft.params import build
    from numagraft.registry import is_dotted, operator_class

    if module.operator == DEFAULT:
        return None
    place = Location(f"rule {module.rule_id[:80]}", 0, 0)  # its modules share what is wrong
    if is_dotted(module.operator) and not trust_code:
        text = f"the dotted class {module.operator[:80]!r}: code outside the registry"
        problems.add(place, text, "pass trust_code=True for a plan of your own")
        return None
    try:
        operator = operator_class(module.operator)
    except ConfigurationError as error:
        problems.add(place, str(error))
        return None
    if not isinstance(module.params, Mapping):
        problems.add(place, f"params are {type(module.params).__name__}, expected an object")
        return None
    return build(
        operator.Params, module.params, Rule(module.rule_id, Match(), Replace(module.operator), place), problems
    )
