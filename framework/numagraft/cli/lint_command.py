"""`numagraft lint` and `numagraft init`: a rule file to start from, and what one had better not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from numagraft.cli.sources import Json, Machine, Model, Settings, TrustCode, read_model, read_platform, read_rules
from numagraft.errors import ConfigurationError, RuleError


def lint(
    rules: Annotated[str, typer.Argument(help="A rule file or a preset's name.")],
    models: Annotated[list[str] | None, typer.Option("--model", "-m", help="Models to plan for; may repeat.")] = None,
    platforms: Annotated[
        list[Path] | None, typer.Option("--platform", help="Machines to plan for (dumps); this one without.")
    ] = None,
    settings: Settings = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    as_json: Json = False,
    trust_code: TrustCode = False,
) -> None:
    """Report what is wrong, doubtful or slow in a rule file. Exit code 1 for errors (with --strict, for warnings)."""
    from numagraft.planning import as_plain
    from numagraft.plans.lint import Finding, worst
    from numagraft.plans.lint import lint as check

    machines = {str(path): read_platform(path) for path in platforms or []} or {"this machine": read_platform(None)}
    skeletons = {model: read_model(model) for model in models or []}
    findings: list[Finding] = []
    for title, skeleton in (skeletons or {"": None}).items():
        config = getattr(skeleton, "config", None)
        for machine, platform in machines.items():
            try:
                loaded = read_rules(rules, platform=platform, config=config, settings=settings, trust_code=trust_code)
            except RuleError as error:
                findings += [Finding("error", each.where, each.message, each.hint) for each in error.problems]
                if not error.problems:
                    findings.append(Finding("error", rules, str(error)))
                continue
            findings += check(loaded, {} if skeleton is None else {title: skeleton}, {machine: platform})
    findings = list(dict.fromkeys(findings))
    gravest = worst(findings)
    if as_json:
        typer.echo(json.dumps({"worst": gravest, "findings": as_plain(findings)}))
    else:
        for finding in findings:
            subject = f" [{finding.subject}]" if finding.subject else ""
            typer.echo(f"{finding.where}: {finding.severity}: {finding.message}{subject}")
            if finding.hint:
                typer.echo(f"    {finding.hint}")
        counts = {severity: sum(each.severity == severity for each in findings) for severity in ("error", "warning", "note")}
        typer.echo(", ".join(f"{count} {severity}{'s' if count != 1 else ''}" for severity, count in counts.items()))
    if gravest == "error" or (strict and gravest == "warning"):
        raise typer.Exit(1)


def init(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("rules.yaml"),
    platform: Machine = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented rule file to start from, for MODEL on this machine."""
    from numagraft.plans.starting_file import starting_file

    if output.exists() and not force:
        raise ConfigurationError(f"{output} exists; give another --output, or --force to replace it")
    title = Path(model).stem if Path(model).suffix else Path(model).name
    text = starting_file(read_model(model), read_platform(platform), title=title)
    output.write_text(text, encoding="utf-8")
    typer.echo(f"{output} written; next: numagraft lint {output} -m {model}, numagraft plan {model} -r {output}")


def register(app: typer.Typer) -> None:
    app.command("lint")(lint)
    app.command("init")(init)
