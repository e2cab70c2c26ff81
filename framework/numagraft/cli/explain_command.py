"""`numagraft explain`: why one module is treated as it is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from numagraft.cli.console import open_console
from numagraft.cli.sources import (
    Json,
    Machine,
    Model,
    Rules,
    Settings,
    TrustCode,
    read_model,
    read_platform,
    read_rules,
)


def explain(
    model: Model,
    module: Annotated[str, typer.Argument(help="The module's qualified name, as `plan` shows it.")],
    rules: Rules = "auto",
    settings: Settings = None,
    platform: Machine = None,
    as_json: Json = False,
    trust_code: TrustCode = False,
) -> None:
    """Walk every rule and say, condition by condition, why it does or does not match MODULE."""
    from numagraft.planning import as_plain
    from numagraft.plans.explanation import explain as make

    machine = read_platform(platform)
    skeleton = read_model(model)
    loaded = read_rules(rules, platform=machine, config=skeleton.config, settings=settings, trust_code=trust_code)
    found = make(skeleton, loaded, machine, module)
    if as_json:
        typer.echo(json.dumps(as_plain(found)))
        return
    from rich.text import Text

    console = open_console()
    layer = "" if found.layer is None else f", layer {found.layer}"
    console.print(Text(f"{found.name}: {found.class_name}, {found.role or 'no role'}{layer}, {found.tower} tower"))
    console.print(Text(f"  {found.decision}", style="bold"))
    for verdict in found.verdicts:
        console.print(Text(f"{verdict.rule_id}  ({verdict.location}): {verdict.outcome}"))
        for condition in verdict.conditions:
            mark, style = ("✓", "green") if condition.holds else ("✗", "red")
            console.print(Text(f"  {mark} {condition.text}  [{condition.found}]", style=style))


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)
