"""`numagraft plan` and `numagraft diff`: what rules would do to a model here, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from numagraft.planning import Plan
    from numagraft.plans.difference import Difference
    from numagraft.plans.prediction import Predictions


def plan(
    model: Model,
    rules: Rules = "auto",
    settings: Settings = None,
    platform: Machine = None,
    as_json: Json = False,
    ignore_fit: Annotated[bool, typer.Option("--ignore-fit", help="Plan even if it does not fit in memory.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to a file: `numagraft run --plan FILE` does it.")
    ] = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the final rules with each value's origin.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Show what each rule replaces, with which operator and placement, and whether it fits. Reads no weights."""
    from numagraft.planning import make_plan
    from numagraft.plans.prediction import predict
    from numagraft.rulefile.resolved import to_yaml

    machine = read_platform(platform)
    skeleton = read_model(model)
    loaded = read_rules(rules, platform=machine, config=skeleton.config, settings=settings, trust_code=trust_code)
    if resolved:
        typer.echo(to_yaml(loaded), nl=False)
        return
    made = make_plan(skeleton, loaded, machine, check_fit=not ignore_fit)
    predictions = predict(made, machine)
    if output is not None:
        output.write_text(made.to_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        data = json.loads(made.to_json())
        data["prediction"] = None if predictions is None else _plain(predictions)
        typer.echo(json.dumps(data))
        return
    console = open_console()
    console.print(made.render())
    if predictions is not None:
        console.print(_prediction_table(predictions))
    if output is not None:
        console.print(f"written to {output}: `numagraft run MODEL --plan {output}` carries it out", highlight=False)


def diff(
    before: Annotated[str, typer.Argument(help="A rule file or preset.")],
    after: Annotated[str, typer.Argument(help="Another one.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model to plan for.")],
    settings: Settings = None,
    platform: Machine = None,
    as_json: Json = False,
) -> None:
    """Show which modules two rule files treat differently, and what that costs. Exit code 1 when they differ."""
    from numagraft.planning import make_plan
    from numagraft.plans.difference import difference

    machine = read_platform(platform)
    skeleton = read_model(model)
    plans: list[Plan] = []
    for rules in (before, after):
        loaded = read_rules(rules, platform=machine, config=skeleton.config, settings=settings)
        plans.append(make_plan(skeleton, loaded, machine, check_fit=False))
    found = difference(*plans)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
    else:
        _print_difference(found, before, after)
    if found:
        raise typer.Exit(1)


def _plain(value: Any) -> Any:
    from numagraft.planning import as_plain

    return as_plain(value)


def _prediction_table(predictions: Predictions) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Prediction, not a measurement: one request", title_justify="left", show_edge=False)
    for heading in ("all by", "decode tokens/s", "prefill tokens/s", "copies in memory"):
        table.add_column(heading, justify="left" if heading == "all by" else "right")
    for each in predictions.alternatives:
        mark = "  (this plan)" if each.policy == predictions.of_plan.policy else ""
        table.add_row(
            each.policy + mark, f"{each.decode_tokens_per_s:,.1f}", f"{each.prefill_tokens_per_s:,.0f}", f"{each.memory:g}"
        )
    lines = [Text(f"  assumed {line}", style="dim") for line in predictions.assumptions]
    if predictions.mirror is not None:
        lines += [Text("A copy on every node (mirror) would buy", style="bold")]
        lines += [Text(f"  {fact}") for fact in predictions.mirror.facts()]
    return Group(table, *lines)


def _print_difference(found: Difference, before: str, after: str) -> None:
    from rich.table import Table

    from numagraft.plans.table import group_name
    from numagraft.sizes import format_size

    console = open_console()
    if not found:
        console.print("no difference")
        return
    groups: dict[tuple[str, str, str], list[str]] = {}
    for change in found.changes:
        key = ".".join("{}" if part.isdigit() else part for part in change.name.split("."))
        groups.setdefault((key, change.before, change.after), []).append(change.name)
    table = Table(show_edge=False)
    for heading in ("modules", before, after):
        table.add_column(heading, overflow="fold")
    for (_, was, becomes), names in groups.items():
        table.add_row(f"{group_name(names)}  ({len(names):,})", was, becomes)
    for node in sorted({*found.node_bytes[0], *found.node_bytes[1]}):
        table.add_row(f"node {node}", *(format_size(side.get(node, 0)) for side in found.node_bytes))
    table.add_row("kept", *(format_size(amount) for amount in found.kept_bytes))
    table.add_row("read per token", *(format_size(amount) for amount in found.bytes_per_token))
    console.print(table)


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)
    app.command("diff")(diff)
