"""Plans as JSON, and back. Imports operators (for their Params) only when reading."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from numagraft.errors import NumagraftError, PlanError, Problem
from numagraft.placement import Part, Placement
from numagraft.planning import KeptModule, Plan, PlannedModule, as_plain
from numagraft.rulefile.rules import DEFAULT, Location, Match, Replace, Rule
from numagraft.runtime import RuntimeLayout, RuntimeNode

SCHEMA = 1


def dump(plan: Plan, *, indent: int | None = None) -> str:
    return json.dumps({"schema": SCHEMA, **to_plain(plan)}, indent=indent)


def to_plain(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; maps keyed by node have text keys, as JSON wants."""
    data = as_plain(plan)
    data["total_bytes"] = plan.total_bytes
    for module, planned in zip(data["modules"], plan.modules, strict=True):
        module["format"] = planned.format
    return data


def load(text: str) -> Plan:
    """Raises PlanError when `text` is no plan, or names an operator or kwargs that are not here."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError("not a plan", [Problem("", f"not JSON: {error}")]) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise PlanError(
            "not a plan", [Problem("schema", f"expected {SCHEMA}, found {found!r}", "`numagraft plan --json` writes one")]
        )
    try:
        return _plan(data)
    except NumagraftError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError("not a plan", [Problem("", f"{type(error).__name__}: {error}")]) from error


def _plan(data: Mapping[str, Any]) -> Plan:
    layout = data["layout"]
    return Plan(
        model_class=data["model_class"],
        source=data["source"],
        layout=RuntimeLayout(
            **{
                **_given(RuntimeLayout, layout),
                "nodes": tuple(
                    RuntimeNode(**{**_given(RuntimeNode, node), "cpus": tuple(node["cpus"])}) for node in layout["nodes"]
                ),
                "distances": tuple(tuple(row) for row in layout.get("distances", ())),
                "notes": tuple(layout.get("notes", ())),
            }
        ),
        modules=tuple(_module(module) for module in data["modules"]),
        kept_bytes=int(data["kept_bytes"]),
        notes=tuple(data["notes"]),
        fallbacks=tuple(data["fallbacks"]),
        node_bytes=_by_node(data["node_bytes"]),
        device_bytes=dict(data["device_bytes"]),
        kept=tuple(KeptModule(**module) for module in data["kept"]),
        bytes_per_token=int(data["bytes_per_token"]),
    )


def _given(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in data.items() if key in names}


def _by_node(data: Mapping[str, int]) -> dict[int, int]:
    return {int(node): int(amount) for node, amount in data.items()}


def _module(data: Mapping[str, Any]) -> PlannedModule:
    placement = data["placement"]
    location = Location(**data["location"])
    return PlannedModule(
        name=data["name"],
        class_name=data["class_name"],
        role=data["role"],
        rule_id=data["rule_id"],
        location=location,
        operator=data["operator"],
        device=data["device"],
        params=_params(data, location),
        placement=None
        if placement is None
        else Placement(
            policy=placement["policy"],
            parts=tuple(
                Part(
                    memory_nodes=tuple(part["memory_nodes"]),
                    interleaved=part["interleaved"],
                    worker_nodes=tuple(part["worker_nodes"]),
                    begin=part["begin"],
                    end=part["end"],
                )
                for part in placement["parts"]
            ),
            reason=placement["reason"],
        ),
        node_bytes=_by_node(data["node_bytes"]),
        device_bytes=dict(data["device_bytes"]),
        bytes_per_token=int(data["bytes_per_token"]),
        note=data["note"],
    )


def _params(data: Mapping[str, Any], location: Location) -> Any:
    """Params, checked like a rule's kwargs: a plan may come from a file that was edited."""
    if data["params"] is None or data["operator"] == DEFAULT:
        return None
    from numagraft.params import build
    from numagraft.registry import load_operator
    from numagraft.rulefile.problems import Problems

    operator = load_operator(data["operator"])
    rule = Rule(data["rule_id"], Match(), Replace(data["operator"]), location)
    problems = Problems()
    params = build(operator.Params, data["params"], rule, problems)
    problems.raise_if_any("not a plan", PlanError)
    return params
