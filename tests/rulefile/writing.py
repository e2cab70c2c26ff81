"""Writes rule files and reads what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from numagraft.errors import RuleError
from numagraft.platform import Platform
from numagraft.rulefile import RuleSet, load_rules

ONE_NODE = Platform.virtual(1, memory_per_node=64 << 30)


def write(folder: Path, text: str, name: str = "rules.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(folder: Path, text: str, **options: Any) -> RuleSet:
    return load_rules(write(folder, text), platform=ONE_NODE, **options)


def problems(folder: Path, text: str, **options: Any) -> list[str]:
    """Every problem of a bad file as "line:column: message | hint", the folder's name left out."""
    with pytest.raises(RuleError) as caught:
        load(folder, text, **options)
    return [
        f"{problem.where}: {problem.message} | {problem.hint}".replace(f"{folder}/", "").replace("rules.yaml:", "", 1)
        for problem in caught.value.problems
    ]
