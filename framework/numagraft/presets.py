"""Presets: named rule files that come with numagraft, and which of them suit a machine and a model. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numagraft.platform import Platform

#: names that stand for a choice; "auto" itself is a preset that extends both
CHOSEN = ("platform/auto", "family/auto")

FOLDERS = ("platform", "family", "generic")


@dataclass(frozen=True)
class Preset:
    """One preset: where it comes from and its text. `shown` is the file's name in errors and plans."""

    name: str
    source: str
    path: Traversable

    @property
    def shown(self) -> str:
        return f"{self.source}/{self.name}.yaml"

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Candidate:
    """One preset that was considered, and why it was chosen or not."""

    name: str
    fits: bool
    why: str


@dataclass(frozen=True)
class Chosen:
    """What a choice came to: the preset, why, and the others with their reasons."""

    name: str
    why: str
    others: tuple[Candidate, ...] = ()


def names() -> list[str]:
    """Every bundled preset's name."""
    root = files("numagraft.rules")
    found = [path.name[:-5] for path in root.iterdir() if path.name.endswith(".yaml")]
    for folder in FOLDERS:
        if (root / folder).is_dir():
            found += [f"{folder}/{path.name[:-5]}" for path in (root / folder).iterdir() if path.name.endswith(".yaml")]
    return sorted(name for name in found if not name.endswith(".manifest"))


def find(name: str) -> Preset | None:
    """The preset called `name`, or None."""
    if name not in names():
        return None
    path = files("numagraft.rules")
    for part in f"{name}.yaml".split("/"):
        path = path / part
    return Preset(name, "numagraft/rules", path)


def choose(platform: Platform, config: Any = None) -> Chosen:
    """What `rules="auto"` means here: "auto", which extends the chosen platform and family presets."""
    family, machine = (choose_part(name, platform, config) for name in ("family/auto", "platform/auto"))
    why = f"{machine.name}: {machine.why}; {family.name}: {family.why}"
    return Chosen("auto", why, machine.others + family.others)


def choose_part(name: str, platform: Platform, config: Any = None) -> Chosen:
    """What "platform/auto" or "family/auto" stands for: the first of its lattice that fits."""
    lattice = _PLATFORMS if name == "platform/auto" else _FAMILIES
    considered: list[Candidate] = []
    for candidate, fit in lattice:
        fits, why = fit(platform, config)
        considered.append(Candidate(candidate, fits, why))
        if fits:
            return Chosen(candidate, why, tuple(considered[:-1]))
    raise AssertionError(f"{name}: the last of a lattice always fits")


_Fit = Callable[["Platform", Any], tuple[bool, str]]


def _one_node(platform: Platform, config: Any) -> tuple[bool, str]:
    count = len(platform.usable_nodes)
    return count == 1, f"{count} usable node{'s' if count != 1 else ''}"


def _several_nodes(platform: Platform, config: Any) -> tuple[bool, str]:
    return True, f"{len(platform.usable_nodes)} usable nodes"


def _any_family(platform: Platform, config: Any) -> tuple[bool, str]:
    return True, "roles cover every family"


_PLATFORMS: tuple[tuple[str, _Fit], ...] = (
    ("platform/one-node", _one_node),
    ("platform/multi-node", _several_nodes),
)
_FAMILIES: tuple[tuple[str, _Fit], ...] = (("family/generic", _any_family),)
