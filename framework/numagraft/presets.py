"""Presets: named rule files from numagraft, directories and packages, and which of them suit a machine and a model. No torch.

A preset of numagraft itself is called `platform/...`, `family/...` or `auto`; one from elsewhere `SOURCE/...`, where
SOURCE is the directory's, the package's or the added pack's name, so that nothing can take the place of another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numagraft.errors import RuleError

if TYPE_CHECKING:
    from numagraft.platform import Platform

#: names that stand for a choice; "auto" itself is a preset that extends both
CHOSEN = ("platform/auto", "family/auto")

#: what `platform/auto` tries, the most specific first; the last one always fits
PLATFORMS = (
    "platform/xeon-amx-snc",
    "platform/xeon-amx",
    "platform/xeon-avx512",
    "platform/epyc-nps",
    "platform/epyc-nps1",
    "platform/dual-xeon-avx2",
    "platform/arm-many-core",
    "platform/one-node",
    "platform/multi-node",
)
FALLBACK_FAMILY = "family/generic"

ENTRY_POINT_GROUP = "numagraft.rules"
PATH_VARIABLE = "NUMAGRAFT_RULES_PATH"
HOME_VARIABLE = "NUMAGRAFT_RULES_HOME"
SUFFIXES = (".yaml", ".yaml.j2")
MANIFEST = ".manifest.yaml"
SOURCE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
MAX_PRESETS = 1_000


@dataclass(frozen=True)
class Source:
    """Where presets come from: `prefix` begins their names ("" for numagraft's own)."""

    prefix: str
    kind: str  # bundled | directory | package | added
    where: str
    root: Traversable


@dataclass(frozen=True)
class Preset:
    """One preset: its name, where it comes from, and its text. `shown` is the file's name in errors and plans."""

    name: str
    source: Source
    path: Traversable
    manifest_path: Traversable | None = None

    @property
    def shown(self) -> str:
        bundled = "numagraft/rules/" if self.source.kind == "bundled" else ""
        suffix = ".yaml.j2" if self.path.name.endswith(".j2") else ".yaml"
        return f"{bundled}{self.name}{suffix}"

    def text(self) -> str:
        """Raises RuleError when it cannot be read, or when an added one was changed since."""
        from numagraft.rulefile.nodes import decode

        if self.source.kind == "added":
            from numagraft import sharing

            sharing.check_unchanged(self.source.prefix)
        try:
            return decode(self.path.read_bytes(), file=self.shown)
        except OSError as error:
            raise RuleError(f"the preset {self.name!r} cannot be read: {error}") from error

    def manifest(self) -> dict[str, Any]:
        """What its manifest says; {} without one. Raises RuleError when it is wrong."""
        if self.manifest_path is None:
            return {}
        from numagraft.rulefile.manifest import read_manifest
        from numagraft.rulefile.nodes import decode

        shown = self.shown.removesuffix(".j2").removesuffix(".yaml") + MANIFEST
        return read_manifest(decode(self.manifest_path.read_bytes(), file=shown), file=shown)


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


def home() -> Path:
    """Where added presets live."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(data) / "numagraft" / "rules"


def sources() -> list[Source]:
    """Every source: numagraft itself, the directories of NUMAGRAFT_RULES_PATH, installed packages, added packs."""
    found = [Source("", "bundled", "numagraft", files("numagraft.rules"))]
    for directory in filter(None, os.environ.get(PATH_VARIABLE, "").split(os.pathsep)):
        path = Path(directory).expanduser()
        if path.is_dir():
            found.append(Source(path.resolve().name, "directory", str(path), path))
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        root = _package_folder(point.value)
        if root is not None:
            found.append(Source(point.name, "package", point.value, root))
    added = home()
    if added.is_dir():
        for path in sorted(added.iterdir()):
            if path.is_dir() and re.fullmatch(SOURCE_NAME, path.name):
                found.append(Source(path.name, "added", str(path), path))
    taken: dict[str, Source] = {}
    for source in found:
        if source.prefix not in taken and source.prefix not in ("platform", "family", "auto"):
            taken[source.prefix] = source
    return list(taken.values())


def _package_folder(value: str) -> Traversable | None:
    """The folder of data that an entry point names ("package" or "package:folder"); the package is found, never imported."""
    from importlib.util import find_spec

    module, _, folder = value.partition(":")
    if "." in module:  # finding a.b imports a
        return None
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / folder if folder else root
    return path if path.is_dir() and path.resolve().is_relative_to(root.resolve()) else None


def catalogue() -> dict[str, Preset]:
    """Every preset by name."""
    found: dict[str, Preset] = {}
    for source in sources():
        found |= {name: preset for name, preset in _presets_of(source).items() if name not in found}
    return found


def _presets_of(source: Source) -> dict[str, Preset]:
    found = {}
    for relative, path, manifest in _walk(source.root):
        name = f"{source.prefix}/{relative}" if source.prefix else relative
        found[name] = Preset(name, source, path, manifest)
    return found


@cache
def _bundled() -> dict[str, Preset]:
    return _presets_of(Source("", "bundled", "numagraft", files("numagraft.rules")))


def _walk(root: Traversable, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Traversable, Traversable | None]]:
    try:
        children = sorted(root.iterdir(), key=lambda path: path.name)
    except OSError:
        return
    by_name = {path.name: path for path in children[:MAX_PRESETS]}
    for name, path in by_name.items():
        if name.startswith((".", "__")):
            continue
        if path.is_dir():
            if depth < 3:
                yield from _walk(path, f"{prefix}{name}/", depth + 1)
            continue
        suffix = next((suffix for suffix in reversed(SUFFIXES) if name.endswith(suffix)), None)
        if suffix is None or name.endswith(MANIFEST):
            continue
        stem = name.removesuffix(suffix)
        yield f"{prefix}{stem}", path, by_name.get(f"{stem}{MANIFEST}")


def names() -> list[str]:
    """Every preset's name."""
    return sorted(catalogue())


def find(name: str) -> Preset | None:
    """The preset called `name`, or None."""
    if name in _bundled():
        return _bundled()[name]
    return catalogue().get(name)


def choose(platform: Platform, config: Any = None) -> Chosen:
    """What `rules="auto"` means here: "auto", which extends the chosen platform and family presets."""
    family, machine = (choose_part(name, platform, config) for name in ("family/auto", "platform/auto"))
    why = f"{machine.name}: {machine.why}; {family.name}: {family.why}"
    return Chosen("auto", why, machine.others + family.others)


def choose_part(name: str, platform: Platform, config: Any = None) -> Chosen:
    """What "platform/auto" or "family/auto" stands for: the first of its lattice whose `requires` hold."""
    considered: list[Candidate] = []
    model_type = _model_type(config)
    lattice = PLATFORMS if name == "platform/auto" else (*_families(), FALLBACK_FAMILY)
    for candidate in lattice:
        failed = unmet(candidate, platform, model_type)
        if candidate == FALLBACK_FAMILY:
            why = f"{f'no preset for {model_type}; ' if model_type else ''}roles cover every family"
            return Chosen(candidate, why, tuple(considered))
        if not failed and candidate == lattice[-1]:
            return Chosen(candidate, _facts(platform), tuple(considered))
        if failed or (name == "family/auto" and model_type is None):
            considered.append(Candidate(candidate, False, failed or "no model is given"))
            continue
        why = f"model_type {model_type}" if name == "family/auto" else _facts(platform)
        return Chosen(candidate, why, tuple(considered))
    return Chosen(lattice[-1], f"nothing else fits; {_facts(platform)}", tuple(considered))


def rank(platform: Platform, config: Any = None) -> list[Candidate]:
    """Every platform and family preset with whether it fits and why not; those that fit first."""
    chosen = {choose_part(name, platform, config).name for name in CHOSEN}
    found = []
    for name in names():
        if name == "auto":
            continue
        failed = unmet(name, platform, _model_type(config))
        families = [requirement.value for requirement in _requires(name) if requirement.key == "model_type"]
        why = failed or ("chosen by auto" if name in chosen else _not_chosen(name))
        if not failed and families and config is None:
            why = f"for {', '.join(families[0])}: name a model to see"
        found.append(Candidate(name, not failed, why))
    return sorted(found, key=lambda candidate: (candidate.name not in chosen, not candidate.fits, candidate.name))


def _not_chosen(name: str) -> str:
    if "gpu" in name:
        return "fits, but auto never moves layers to a GPU by itself"
    if name in (*PLATFORMS, FALLBACK_FAMILY):
        return "fits, but another fits more closely"
    return "fits; name it to use it"


def unmet(name: str, platform: Platform, model_type: str | None) -> str:
    """Why the preset's own `requires` do not hold, or ""."""
    from numagraft.rulefile.requires import why_not

    failed = []
    for requirement in _requires(name):
        text = why_not(requirement, platform, model_type)
        if text:
            failed.append(text)
    return "; ".join(failed)


@cache
def _requires_of(text: str, shown: str) -> tuple[Any, ...]:
    from numagraft.rulefile.document import read_document
    from numagraft.rulefile.nodes import parse
    from numagraft.rulefile.problems import Problems

    if shown.endswith(".j2"):
        # `requires` of a template must stand in it as they are: they say whether it can be rendered here
        found = re.search(r"^requires: \{.*\}$", text, re.MULTILINE)
        text = f"schema: 1\n{found[0]}\n" if found else "schema: 1\n"
    problems = Problems()
    document = read_document(parse(text, file=shown), file=shown, problems=problems, trusted=False)
    return document.requires


def _requires(name: str) -> Sequence[Any]:
    preset = find(name)
    return () if preset is None else _requires_of(preset.text(), preset.shown)


def _families() -> list[str]:
    return [name for name in sorted(_bundled()) if name.startswith("family/") and name != FALLBACK_FAMILY]


def _model_type(config: Any) -> str | None:
    found = getattr(config, "model_type", None)
    return found if isinstance(found, str) else None


def _facts(platform: Platform) -> str:
    nodes = len(platform.usable_nodes)
    sockets = len(platform.sockets)
    name = platform.cpu.vendor or platform.cpu.arch
    return (
        f"{nodes} usable node{'s' if nodes != 1 else ''}, {sockets} socket{'s' if sockets != 1 else ''}, "
        f"{name + ' ' if name else ''}{platform.isa[0]}"
    )
