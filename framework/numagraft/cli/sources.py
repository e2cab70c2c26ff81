"""What the commands that plan have in common: a model's skeleton, a machine, rules, tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from numagraft.platform import Platform
    from numagraft.rulefile.rules import RuleSet

Model = Annotated[str, typer.Argument(help="A directory, a GGUF file, a config.json or a hub id.")]
Rules = Annotated[str, typer.Option("--rules", "-r", help="A rule file, a preset's name, or auto.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override, e.g. vars.format=int8.")
]
Machine = Annotated[
    Path | None, typer.Option("--platform", help="Another machine: a folder, archive or JSON dump of it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TrustCode = Annotated[bool, typer.Option(help="Let the rule file name classes by dotted path.")]


def read_platform(path: Path | None) -> Platform:
    """This machine, or the dump at `path`."""
    from numagraft.platform import Platform

    return Platform.detect() if path is None else Platform.from_dump(path)


def read_model(model: str) -> nn.Module:
    """The model's skeleton on meta, in the dtype that it is loaded in; no weights are read."""
    from numagraft import skeleton

    quiet_transformers()
    path = Path(model).expanduser()
    config = None if path.suffix == ".gguf" else skeleton.load_config(model)
    quantised = getattr(config, "quantization_config", None) is not None and any(path.glob("*.safetensors"))
    if config is None or quantised:  # headers know the dtype, or what is quantised; the configuration does not
        from numagraft.checkpoints import open_checkpoint

        with open_checkpoint(path) as checkpoint:
            return skeleton.build_for(checkpoint)
    return skeleton.build(config)


def read_rules(
    rules: str, *, platform: Platform, config: Any = None, settings: list[str] | None = None, trust_code: bool = False
) -> RuleSet:
    from numagraft.rulefile import load_rules

    return load_rules(rules, overrides=settings or [], trust_code=trust_code, platform=platform, config=config)


def quiet_transformers() -> None:
    """Its notes about configurations are not ours to print."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def fail(code: int = 1) -> None:
    """Ends the command with `code`: a check failed."""
    raise typer.Exit(code)
