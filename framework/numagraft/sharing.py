"""Presets from others: checked, packed, added and removed, with their contents recorded in a lock file. No torch.

A shared preset is data only. What is added is copied: rule files, templates and manifests, nothing else, nothing that is a
link, each checked before anything is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from numagraft import presets
from numagraft.errors import ConfigurationError, Problem, RuleError
from numagraft.rulefile.nodes import MAX_BYTES, decode

LOCK = "numagraft-rules.lock"
SCHEMA = 1
MAX_FILES = 500
MAX_PACK_BYTES = 16 << 20
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Added:
    """One added source as the lock file records it; `replaced` is the digest of other contents that it took the place of."""

    name: str
    origin: str
    revision: str
    sha256: str
    presets: tuple[str, ...] = ()
    replaced: str = ""


def validate(folder: Path) -> list[Problem]:
    """Everything that keeps `folder` from being shared: wrong files, strange files, missing or wrong manifests."""
    try:
        contents = read_folder(folder)
    except ConfigurationError as error:
        return list(error.problems) or [Problem(str(folder), str(error))]
    return check_contents(contents, shown=str(folder))


def read_folder(folder: Path) -> dict[str, bytes]:
    """Relative path -> contents of every file that belongs to a preset.

    Raises ConfigurationError for links, strange files and too much of them.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no directory", [Problem(str(folder), "expected a folder of rule files")])
    contents: dict[str, bytes] = {}
    problems: list[Problem] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            path = Path(directory) / name
            relative = path.relative_to(folder).as_posix()
            if name.startswith((".", "__init__")) or name.lower().startswith(("readme", "license")):
                continue
            if path.is_symlink() or not path.is_file():
                problems.append(Problem(str(path), "is a link or no regular file", "a preset is plain files"))
            elif not name.endswith(presets.SUFFIXES):
                expected = f"expected {' or '.join(presets.SUFFIXES)}"
                problems.append(Problem(str(path), "does not belong to a preset", expected))
            elif path.stat().st_size > MAX_BYTES:
                problems.append(Problem(str(path), f"has {path.stat().st_size:,} bytes", f"at most {MAX_BYTES:,}"))
            else:
                contents[relative] = path.read_bytes()
            if len(contents) > MAX_FILES:
                raise ConfigurationError(f"{folder} holds more than {MAX_FILES} files")
    if problems:
        raise ConfigurationError(f"{folder} cannot be shared", problems)
    return contents


def check_contents(contents: Mapping[str, bytes], *, shown: str) -> list[Problem]:
    """Problems of the files themselves: every rule file follows the schema and has a manifest, and names no code."""
    from numagraft.rulefile.document import read_document
    from numagraft.rulefile.manifest import read_manifest
    from numagraft.rulefile.nodes import parse
    from numagraft.rulefile.problems import Problems

    problems: list[Problem] = []
    rule_files = [name for name in contents if not name.endswith(presets.MANIFEST)]
    if not rule_files:
        problems.append(Problem(shown, "holds no rule file"))
    for name, data in contents.items():
        place = f"{shown}/{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", name) or ".." in name:
            problems.append(Problem(place, "a strange name", "letters, digits, _, - and /"))
            continue
        try:
            text = decode(data, file=place)
            if name.endswith(presets.MANIFEST):
                read_manifest(text, file=place)
                continue
            stem = name.removesuffix(".j2").removesuffix(".yaml")
            if f"{stem}{presets.MANIFEST}" not in contents:
                problems.append(Problem(place, "has no manifest", f"write {stem}{presets.MANIFEST} (docs/presets.md)"))
            if name.endswith(".j2"):
                continue  # what it renders to depends on the machine; it is checked when it is used
            collected = Problems()
            document = read_document(parse(text, file=place), file=place, problems=collected, trusted=False)
            for entry in document.rules:
                replace = entry.values.get("replace")
                operator = replace.get("class") if isinstance(replace, dict) else None
                if isinstance(operator, str) and ("." in operator or ":" in operator) and "${" not in operator:
                    collected.add(entry.location, f"the dotted class {operator!r}", "a shared preset names no code")
            problems += collected.sorted()
        except RuleError as error:
            problems += error.problems
    return problems


def digest(contents: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents, in order of names."""
    whole = hashlib.sha256()
    for name in sorted(contents):
        whole.update(f"{name}\0{len(contents[name])}\0".encode())
        whole.update(contents[name])
    return whole.hexdigest()


def pack(folder: Path, output: Path) -> str:
    """Writes `folder`'s presets as a .tar.gz that is the same for the same contents; returns their digest.

    Raises ConfigurationError with every problem of `validate`.
    """
    problems = validate(folder)
    if problems:
        raise ConfigurationError(f"{folder} cannot be packed", problems)
    contents = read_folder(folder)
    buffer = io.BytesIO()
    import gzip

    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for name in sorted(contents):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(contents[name]), 0o644
            archive.addfile(info, io.BytesIO(contents[name]))
    output.write_bytes(buffer.getvalue())
    return digest(contents)


def read_pack(path: Path) -> dict[str, bytes]:
    """The files of a pack; nothing is unpacked. Raises ConfigurationError for anything but plain files in bounds."""
    contents: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, mode="r:gz") as archive:
            for member in archive:
                total += member.size
                if not member.isfile() or total > MAX_PACK_BYTES or member.size > MAX_BYTES or len(contents) >= MAX_FILES:
                    raise ConfigurationError(f"{path}: {member.name!r} is no plain file, or there is too much of it")
                file = archive.extractfile(member)
                assert file is not None
                contents[member.name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigurationError(f"{path} is no pack of rules: {error}") from error
    return contents


def add(origin: str, *, name: str | None = None, replace: bool = False) -> Added:
    """Copies a folder, a pack or `hf:OWNER/REPO@REVISION` into the user's presets and records its digest.

    Raises ConfigurationError with every problem, before anything is written; for a name that is taken; and for a hub
    repository without a revision (a pinned one is the point).
    """
    revision = ""
    if origin.startswith(HUB_PREFIX):
        folder, revision, default = _from_hub(origin.removeprefix(HUB_PREFIX))
        try:
            contents = read_folder(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        path = Path(origin).expanduser()
        default = path.name.removesuffix(".gz").removesuffix(".tar")
        contents = read_folder(path) if path.is_dir() else read_pack(path)
    name = name or default
    if not re.fullmatch(presets.SOURCE_NAME, name) or name in ("platform", "family", "auto"):
        raise ConfigurationError(f"{name!r} cannot name a source of presets; give another with --name")
    problems = check_contents(contents, shown=name)
    if problems:
        raise ConfigurationError(f"{origin} cannot be added", problems)
    home = presets.home()
    target = home / name
    if target.exists() and not replace:
        raise ConfigurationError(f"{name!r} is there already; --replace replaces it, --name gives another name")
    before = read_lock().get(name)
    found = digest(contents)
    if revision and before is not None and (before.origin, before.revision) == (origin, revision) and before.sha256 != found:
        raise ConfigurationError(
            f"{origin} is not what it was when it was added",
            [
                Problem(
                    str(home / LOCK),
                    f"found sha256 {found[:16]}..., recorded {before.sha256[:16]}...: a commit cannot change",
                    f"do not trust its source; to take it nevertheless: numagraft rules remove {name}, and add it again",
                )
            ],
        )
    home.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=home, prefix=".adding-"))
    try:
        for relative, data in contents.items():
            path = fresh / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    stems = sorted(
        file.removesuffix(".j2").removesuffix(".yaml") for file in contents if not file.endswith(presets.MANIFEST)
    )
    replaced = before.sha256 if before is not None and before.sha256 != found else ""
    added = Added(name, origin, revision, found, tuple(f"{name}/{stem}" for stem in stems), replaced)
    _write_lock({**read_lock(), name: added})
    return added


def remove(name: str) -> Added:
    """Deletes an added source. Raises ConfigurationError when there is none."""
    lock = read_lock()
    if name not in lock:
        known = ", ".join(sorted(lock)) or "none"
        raise ConfigurationError(f"no source of presets called {name!r} was added; added: {known}")
    shutil.rmtree(presets.home() / name, ignore_errors=True)
    removed = lock.pop(name)
    _write_lock(lock)
    return removed


def read_lock() -> dict[str, Added]:
    """What was added. Raises ConfigurationError when the lock file is damaged."""
    path = presets.home() / LOCK
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}")
        return {
            name: Added(name, entry["origin"], entry["revision"], entry["sha256"], tuple(entry["presets"]))
            for name, entry in data["sources"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is damaged: {error}; remove it and add the presets again") from error


def _write_lock(lock: Mapping[str, Added]) -> None:
    sources = {
        name: {"origin": each.origin, "revision": each.revision, "sha256": each.sha256, "presets": list(each.presets)}
        for name, each in sorted(lock.items())
    }
    path = presets.home() / LOCK
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"schema": SCHEMA, "sources": sources}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def check_unchanged(name: str) -> None:
    """Raises RuleError when an added source is not what was added: its files differ from the lock file's digest."""
    entry = read_lock().get(name)
    folder = presets.home() / name
    if entry is None:
        raise RuleError(
            f"the presets {name!r} are not in the lock file",
            [Problem(str(folder), "nobody added them", "numagraft rules add")],
        )
    try:
        found = digest(read_folder(folder))
    except ConfigurationError as error:
        raise RuleError(f"the presets {name!r} were changed since they were added", list(error.problems)) from error
    if found != entry.sha256:
        raise RuleError(
            f"the presets {name!r} were changed since they were added",
            [
                Problem(
                    str(folder),
                    f"found sha256 {found[:16]}..., recorded {entry.sha256[:16]}...",
                    f"add them again: numagraft rules add {entry.origin} --name {name} --replace",
                )
            ],
        )


def _from_hub(text: str) -> tuple[Path, str, str]:
    """The snapshot of OWNER/REPO@REVISION, the commit it is, and a name for it."""
    repository, at, revision = text.partition("@")
    pinned = bool(at) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    if not pinned and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        raise ConfigurationError(
            f"hf:{text} names no commit", [Problem("", "a shared preset is pinned", "hf:OWNER/REPO@COMMIT, 40 hex digits")]
        )
    from huggingface_hub import HfApi, snapshot_download

    if not pinned:
        hint = "hf:OWNER/REPO@COMMIT, 40 hex digits"
        try:
            commit = HfApi().repo_info(repository, revision=revision or None).sha
            hint = f"{revision or 'its main branch'} is now hf:{repository}@{commit}: read it there, then add that"
        except Exception:  # of whichever transport: which commit it is would only have helped
            hint = "hf:OWNER/REPO@COMMIT, 40 hex digits"
        raise ConfigurationError(f"hf:{text} names no commit", [Problem("", "a shared preset is pinned", hint)])
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=["*.yaml", "*.yaml.j2", "**/*.yaml", "**/*.yaml.j2"]
        )
    except Exception as error:  # of the hub's client, or of whichever transport it uses
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(f"hf:{text} cannot be had: {first}") from error
    return _without_links(Path(folder)), revision, repository.rpartition("/")[2]


def _without_links(snapshot: Path) -> Path:
    """A copy of a hub snapshot, whose files are links into the cache, as plain files."""
    copy = Path(tempfile.mkdtemp(prefix="numagraft-hub-"))
    for path in snapshot.rglob("*"):
        if path.is_file() and path.name.endswith(presets.SUFFIXES) and path.stat().st_size <= MAX_BYTES:
            target = copy / path.relative_to(snapshot)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy
