"""`numagraft plan`: what a rule file would do to a model here, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from numagraft.planning import Plan
    from numagraft.platform import Platform


def plan(
    model: Annotated[str, typer.Argument(help="A directory, a GGUF file, a config.json or a hub id.")],
    rules: Annotated[str, typer.Option("--rules", "-r", help="A rule file, a preset's name, or auto.")] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override, e.g. vars.format=int8.")
    ] = None,
    platform: Annotated[
        Path | None, typer.Option(help="Plan for another machine: a folder, archive or JSON dump.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    ignore_fit: Annotated[bool, typer.Option("--ignore-fit", help="Plan even if it does not fit in memory.")] = False,
    trust_code: Annotated[bool, typer.Option(help="Let the rule file name classes by dotted path.")] = False,
) -> None:
    """Show what each rule replaces, with which operator and placement, and whether it fits. Reads no weights."""
    made = make(
        model, rules, settings=settings or [], platform=platform, check_fit=not ignore_fit, trust_code=trust_code
    )
    if as_json:
        typer.echo(made.to_json())
        return
    from rich.console import Console

    Console().print(made.render())


def make(
    model: str,
    rules: str,
    *,
    settings: list[str],
    platform: Path | None = None,
    check_fit: bool = True,
    trust_code: bool = False,
) -> Plan:
    """Loads the rules and plans; shared with the other commands that need a plan."""
    from numagraft import skeleton
    from numagraft.planning import make_plan
    from numagraft.rulefile import load_rules

    machine = read_platform(platform)
    config = skeleton.load_config(model)
    loaded = load_rules(rules, overrides=settings, trust_code=trust_code, platform=machine, config=config)
    return make_plan(skeleton.build(config), loaded, machine, check_fit=check_fit)


def read_platform(path: Path | None) -> Platform:
    """This machine, or the dump at `path`."""
    from numagraft.platform import Platform

    return Platform.detect() if path is None else Platform.from_dump(path)


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)
