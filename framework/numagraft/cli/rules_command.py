"""`numagraft rules ...`: presets listed, shown, matched, checked, packed, added, removed; other people's files converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from numagraft.cli.console import open_console
from numagraft.cli.sources import Json, Machine, Settings, quiet_transformers, read_platform, read_rules
from numagraft.errors import ConfigurationError

rules_app = typer.Typer(name="rules", help="Find, check and share rule presets.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A preset's name, or a rule file.")]
Folder = Annotated[Path, typer.Argument(help="A folder of rule files with their manifests.")]


@rules_app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List every preset there is, and where it comes from."""
    from numagraft import presets

    rows = []
    for name, preset in sorted(presets.catalogue().items()):
        status, description = _about(preset)
        rows.append(
            {"name": name, "source": preset.source.kind, "where": preset.source.where, "status": status, "about": description}
        )
    if as_json:
        typer.echo(json.dumps(rows))
        return
    _table(("preset", "source", "status", "about"), [(r["name"], r["source"], r["status"], r["about"]) for r in rows])


def _about(preset: Any) -> tuple[str, str]:
    from numagraft.errors import NumagraftError
    from numagraft.rulefile.nodes import Leaf, Table, parse

    try:
        status = str(preset.manifest().get("status", "no manifest"))
        text = preset.text()
        if preset.path.name.endswith(".j2"):
            line = next((line for line in text.splitlines() if line.startswith("description:")), "")
            return status, line.partition(":")[2].strip()
        node = parse(text, file=preset.shown)
        leaf = node.get("description") if isinstance(node, Table) else None
        return status, str(leaf.value) if isinstance(leaf, Leaf) else ""
    except NumagraftError as error:
        return "wrong", str(error).splitlines()[0]


@rules_app.command("show")
def show(
    name: Name,
    settings: Settings = None,
    platform: Machine = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Composed and resolved, with each value's origin.")] = False,
    as_json: Json = False,
) -> None:
    """Print a preset as it is written, with its manifest; or what it comes to on this machine."""
    from numagraft import presets

    preset = presets.find(name)
    if resolved or preset is None:
        from numagraft.rulefile.resolved import to_yaml

        typer.echo(to_yaml(read_rules(name, platform=read_platform(platform), settings=settings)), nl=False)
        return
    if as_json:
        typer.echo(json.dumps({"name": name, "text": preset.text(), "manifest": preset.manifest()}))
        return
    typer.echo(preset.text(), nl=False)
    manifest = preset.manifest()
    if manifest:
        typer.echo("\n# manifest")
        for key in ("status", "memory", "firmware", "author", "licence"):
            if manifest.get(key):
                typer.echo(f"# {key}: {manifest[key]}")
        for each in manifest.get("validated_on") or []:
            typer.echo(f"# validated: {_validated(each)}")


def _validated(entry: dict[str, Any]) -> str:
    """One measurement of a manifest on one line; `--json` has all of it."""
    machine, versions = entry["machine"], entry.get("versions") or {}
    speeds = [
        f"{phase} {entry[f'{phase}_tokens_per_s']:,.1f} tokens/s ({entry.get(f'{tokens}_tokens', '?')} tokens)"
        for phase, tokens in (("prefill", "prompt"), ("decode", "new"))
        if f"{phase}_tokens_per_s" in entry
    ]
    facts = [f"{key} {machine[key]}" for key in ("cpu", "isa", "numa_nodes", "cores", "memory_gib") if key in machine]
    made_with = [f"{name} {number}" for name, number in versions.items()]
    distorted = [f"distorted: {text}" for text in entry.get("distortions") or []]
    return "; ".join([f"{entry['date']} {entry['model']}", *speeds, ", ".join(facts), ", ".join(made_with), *distorted])


@rules_app.command("match")
def match_presets(
    model: Annotated[str | None, typer.Argument(help="A model, to rank family presets too.")] = None,
    platform: Machine = None,
    as_json: Json = False,
) -> None:
    """Rank presets for this machine (and MODEL), and say why the others were not chosen."""
    from numagraft import presets

    config = None
    if model is not None:
        from numagraft import skeleton

        quiet_transformers()
        config = skeleton.load_config(model)
    candidates = presets.rank(read_platform(platform), config)
    if as_json:
        typer.echo(json.dumps([{"name": c.name, "fits": c.fits, "why": c.why} for c in candidates]))
        return
    _table(("preset", "fits", "why"), [(c.name, "yes" if c.fits else "no", c.why) for c in candidates])


@rules_app.command("validate")
def validate(folder: Folder, as_json: Json = False) -> None:
    """Check a folder of presets before sharing it. Exit code 1 when something is wrong."""
    from numagraft import sharing

    problems = sharing.validate(folder)
    if as_json:
        typer.echo(json.dumps([{"where": p.where, "message": p.message, "hint": p.hint} for p in problems]))
    else:
        for problem in problems:
            typer.echo(str(problem))
        typer.echo(f"{len(problems)} problem{'s' if len(problems) != 1 else ''}")
    if problems:
        raise typer.Exit(1)


@rules_app.command("pack")
def pack(
    folder: Folder, output: Annotated[Path | None, typer.Option("--output", "-o", help="The .tar.gz to write.")] = None
) -> None:
    """Pack a folder of presets into one file to share."""
    from numagraft import sharing

    target = output or Path(f"{folder.resolve().name}.tar.gz")
    found = sharing.pack(folder, target)
    typer.echo(f"{target} written, sha256 of its contents {found}")


@rules_app.command("add")
def add(
    origin: Annotated[str, typer.Argument(help="A folder, a pack, or hf:OWNER/REPO@COMMIT.")],
    name: Annotated[str | None, typer.Option(help="What its presets' names begin with.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace presets added under this name.")] = False,
) -> None:
    """Copy presets into your own collection; their contents are recorded and a later change is refused."""
    from numagraft import sharing

    added = sharing.add(origin, name=name, replace=replace)
    typer.echo(f"added {', '.join(added.presets)} (sha256 {added.sha256[:16]}...)")
    if added.replaced:
        typer.echo(f"its contents changed: they were sha256 {added.replaced[:16]}...")


@rules_app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="The name that they were added under.")]) -> None:
    """Delete presets that were added."""
    from numagraft import sharing

    typer.echo(f"removed {', '.join(sharing.remove(name).presets)}")


@rules_app.command("import")
def import_rules(
    file: Annotated[Path | None, typer.Argument(help="A rule file of KTransformers.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write it; printed without.")] = None,
    override_tensor: Annotated[
        list[str] | None, typer.Option("--override-tensor", "-ot", help="llama.cpp's REGEX=BUFFER; may repeat.")
    ] = None,
    kt: Annotated[str | None, typer.Option("--kt-flags", help="SGLang's --kt-* flags, as one text.")] = None,
) -> None:
    """Convert other tools' rules into a rule file; what has no counterpart is listed on stderr."""
    from numagraft.rulefile import ktransformers
    from numagraft.rulefile.nodes import read_text

    given = [each for each in (file, override_tensor, kt) if each]
    if len(given) != 1:
        raise ConfigurationError("give one of FILE, --override-tensor, --kt-flags")
    if file is not None:
        made = ktransformers.convert(read_text(file), file=str(file))
    elif override_tensor:
        made = ktransformers.convert_tensor_overrides(override_tensor)
    else:
        import shlex

        made = ktransformers.convert_flags(shlex.split(kt or ""))
    if output is None:
        typer.echo(made.text, nl=False)
    else:
        output.write_text(made.text, encoding="utf-8")
        typer.echo(f"{output} written: {made.rules} rules")
    for note in made.notes:
        typer.echo(f"not taken along: {note}", err=True)


@rules_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    from numagraft.rulefile.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    open_console().print(table)


def register(app: typer.Typer) -> None:
    app.add_typer(rules_app)
