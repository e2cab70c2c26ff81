"""Rules from wherever they are written to one flat, resolved RuleSet. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numagraft import presets
from numagraft.errors import RuleError
from numagraft.registry import operator_table
from numagraft.rulefile import schema
from numagraft.rulefile.compose import Composition, compose, linearize
from numagraft.rulefile.document import Document, RuleEntry, read_document
from numagraft.rulefile.nodes import Items, Leaf, Node, Table, from_python, parse, read_text
from numagraft.rulefile.overrides import apply_overrides, read_overrides
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import DEFAULT, Location, Match, Replace, Requirement, Rule, RuleSet
from numagraft.rulefile.variables import REFERENCE, check_interpolations, resolve_vars, substitute
from numagraft.runtime import RuntimeSettings

if TYPE_CHECKING:
    from numagraft.platform import Platform

AUTO = "auto"
SUFFIXES = (".yaml", ".yml", ".yaml.j2", ".yml.j2")


def load_rules(
    source: str | Path | Mapping[str, Any] | Sequence[Any] | RuleSet,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    trust_code: bool = False,
    platform: Platform | None = None,
    config: Any = None,
) -> RuleSet:
    """The rules of a file, a preset's name, "auto", or plain Python data, composed, overridden and resolved.

    `platform` and the model's `config` decide what "auto", `platform/auto` and `family/auto` stand for; without a platform
    this machine is detected when one of them is used. `trust_code` lets the user's own file (never a preset) name a class by
    its dotted path. Nothing is imported or matched here.

    Raises RuleError with every problem at file:line:column.

    >>> rules = load_rules({"rules": [{"id": "all", "match": {"role": "linear"}, "replace": {"class": "linear"}}]})
    >>> [rule.id for rule in rules.rules]
    ['all']
    """
    if isinstance(source, RuleSet):
        if overrides:
            raise RuleError("a RuleSet is resolved already: give the overrides where it is loaded")
        return source
    reader = _Reader(platform=platform, config=config, trust_code=trust_code)
    root = reader.root(source)
    subject = reader.subject
    before = len(reader.problems)
    documents = linearize(root, reader.resolve, reader.problems)
    if len(reader.problems) > before:  # without what it extends, everything inherited would look unknown
        reader.problems.raise_if_any(subject)
    composition = compose(documents, reader.problems)
    given = read_overrides(overrides, reader.problems)
    composition = apply_overrides(composition, given, reader.problems)
    rules = _resolve(composition, subject, reader.problems, tuple(reader.notes))
    reader.problems.raise_if_any(subject)
    return rules


class _Reader:
    """Finds and reads files and presets, each once."""

    def __init__(self, *, platform: Platform | None, config: Any, trust_code: bool) -> None:
        self.problems = Problems()
        self.notes: list[str] = []
        self.subject = "rules"
        self._platform = platform
        self._config = config
        self._trust_code = trust_code
        self._documents: dict[str, Document] = {}
        self._root_directory: Path | None = None

    def root(self, source: str | Path | Mapping[str, Any] | Sequence[Any]) -> Document:
        if isinstance(source, Mapping) or (isinstance(source, Sequence) and not isinstance(source, str | Path)):
            node = from_python(source, file="rules", path="rules" if not isinstance(source, Mapping) else "")
            self._root_directory = Path.cwd()
            return read_document(
                node, file="rules", problems=self.problems, trusted=self._trust_code, directory=os.getcwd(), python=True
            )
        if not isinstance(source, str | Path):
            raise RuleError(f"rules are given as {type(source).__name__}, expected a path, a preset's name or a mapping")
        text = os.fspath(source)
        self.subject = text
        path = _path(text)
        if path is not None and (isinstance(source, Path) or text.endswith(SUFFIXES) or _is_file(path)):
            self._root_directory = path.resolve().parent
            document = self._read_path(path, shown=text, trusted=self._trust_code)
        else:
            found = self._preset(text, Location(text, 0, 0), argument=True)
            if found is None:
                self.subject = "rules"
                self.problems.raise_if_any(self.subject)
            assert found is not None
            document = found
        return document

    def resolve(self, name: str, place: Location, by: Document) -> Document | None:
        """What `extends: name` in `by` means: ./ is a file beside it, anything else a preset."""
        if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES):
            return self._relative(name, place, by)
        return self._preset(name, place)

    def _relative(self, name: str, place: Location, by: Document) -> Document | None:
        if by.directory is None:
            self.problems.add(place, f"a preset extends the file {name!r}", "a preset may extend presets only")
            return None
        assert self._root_directory is not None
        path = Path(by.directory) / name
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            self.problems.add(place, f"{name!r} cannot be resolved: {error}", "give a file beside this one")
            return None
        root = self._root_directory.resolve()
        if os.path.isabs(name) or name.startswith("~") or not real.is_relative_to(root):
            hint = "put the file beside the rule file or below, or make it a preset"
            self.problems.add(place, f"{name!r} leads out of the rule file's own folder", hint)
            return None
        if not name.endswith(SUFFIXES):
            self.problems.add(place, f"{name!r} is no rule file", f"its name ends in {' or '.join(SUFFIXES[:3])}")
            return None
        shown = os.path.normpath(os.path.join(os.path.dirname(by.file) if by.file != "rules" else "", name))
        try:
            return self._read_path(path, shown=shown, trusted=self._trust_code, place=place)
        except RuleError as error:
            for problem in error.problems:
                known = problem.where == str(place)
                self.problems.add(place if known else _parsed(problem.where), problem.message, problem.hint)
            return None

    def _read_path(self, path: Path, *, shown: str, trusted: bool, place: Location | None = None) -> Document:
        if shown not in self._documents:
            text = read_text(path, location=place)
            node = self._parse(text, shown)
            self._documents[shown] = read_document(
                node, file=shown, problems=self.problems, trusted=trusted, directory=str(path.resolve().parent)
            )
        return self._documents[shown]

    def _parse(self, text: str, file: str) -> Node:
        if file.endswith(".j2"):
            from numagraft.rulefile.template import render

            rendered = render(text, file=file, platform=self.platform(), config=self._config)
            return parse(rendered.text, file=file, line_map=rendered.lines)
        return parse(text, file=file)

    def _preset(self, name: str, place: Location, *, argument: bool = False) -> Document | None:
        if name in presets.CHOSEN:
            chosen = presets.choose_part(name, self.platform(), self._config)
            note = f"{name}: {chosen.name} ({chosen.why})"
            if note not in self.notes:
                self.notes.append(note)
            name = chosen.name
        preset = presets.find(name)
        if preset is None:
            hint = did_you_mean(name, presets.names(), otherwise="presets")
            what = "neither a rule file nor a preset" if argument else "not a preset"
            if not argument:
                hint += " (a file beside this one starts with ./)"
            shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}..."
            self.problems.add(Location(name[:80], 0, 0) if argument else place, f"{shown} is {what}", hint)
            return None
        shown = preset.shown
        if shown not in self._documents:
            node = self._parse(preset.text(), shown)
            self._documents[shown] = read_document(node, file=shown, problems=self.problems, trusted=False)
        return self._documents[shown]

    def platform(self) -> Platform:
        if self._platform is None:
            from numagraft.platform import Platform

            self._platform = Platform.detect()
        return self._platform


def _path(text: str) -> Path | None:
    """None where `text` can be no path."""
    try:
        return Path(text).expanduser() if text and "\0" not in text else None
    except RuntimeError:  # the home of an unknown user
        return None


def _is_file(path: Path) -> bool:
    try:
        return str(path) != AUTO and path.is_file()
    except OSError:
        return False


def _parsed(where: str) -> Location:
    """A problem's place read back from text, so that problems of several files sort together."""
    file, _, rest = where.partition(" (rendered line ")
    parts = file.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        rendered = int(rest.rstrip(")")) if rest else None
        return Location(parts[0], int(parts[1]), int(parts[2]), rendered)
    return Location(where, 0, 0)


def _resolve(composition: Composition, source: str, problems: Problems, notes: tuple[str, ...]) -> RuleSet:
    runtime_values = schema.RUNTIME.read(composition.runtime, problems)
    settings = _settings({} if runtime_values is schema.INVALID else runtime_values)
    runtime_scope = {
        "nodes": list(settings.nodes) if isinstance(settings.nodes, tuple) else settings.nodes,
        "threads_per_node": settings.threads_per_node,
        "pages": settings.pages,
        "strict": settings.strict,
    }
    before = len(problems)
    variables = resolve_vars(composition.vars, runtime_scope, problems)
    scope = {"vars": variables, "runtime": runtime_scope}
    rules = []
    root = composition.documents[0]
    wrong_vars = len(problems) > before
    for entry in composition.rules:
        if wrong_vars:  # every rule that uses them would report them again
            replace = entry.node.get("replace")
            if replace is not None:
                check_interpolations(replace, problems)
            continue
        rule = _rule(entry, scope, problems, inherited=entry.file != root.file)
        if rule is not None:
            rules.append(rule)
    if isinstance(root.node, Table) and "rules" not in root.node.entries and not composition.rules:
        place = root.node.location if root.directory else Location(source, 0, 0)
        problems.add(place, "no rules, neither here nor in what it extends", "add `rules:`, or `extends: [auto]`")
    marks: dict[str, Location] = {}
    _collect_marks(composition.vars, "vars", marks)
    _collect_marks(composition.runtime, "runtime", marks)
    return RuleSet(
        source=source,
        description=next((d.description for d in composition.documents if d.description), ""),
        requires=composition.requires,
        vars=variables,
        runtime=settings,
        rules=tuple(rules),
        notes=notes,
        marks=marks,
        files=tuple(document.file for document in composition.documents),
    )


def _settings(values: Mapping[str, Any]) -> RuntimeSettings:
    values = dict(values)
    if isinstance(values.get("nodes"), list):
        values["nodes"] = tuple(dict.fromkeys(values["nodes"]))
    return RuntimeSettings(**values)


def _rule(entry: RuleEntry, scope: Mapping[str, Any], problems: Problems, *, inherited: bool) -> Rule | None:
    values = entry.values
    match_values = values.get("match")
    replace_node = entry.node.get("replace")
    if not isinstance(match_values, Mapping) or not isinstance(replace_node, Table):
        return None  # reported when the file was read
    marks: dict[str, Location] = {}
    for key, place in entry.node.keys.items():
        marks[key] = place
    for key in ("match", "replace"):
        _collect_marks(entry.node.get(key), key, marks)
    found = Problems()
    check_interpolations(replace_node, found)
    if found:
        problems.absorb(found)
        return None
    replace = substitute(replace_node, scope, problems)
    operator = _operator(replace.get("class"), entry, marks.get("replace.class", replace_node.location), problems)
    device = _device(replace.get("device"), marks.get("replace.device", replace_node.location), problems)
    kwargs = replace.get("kwargs") or {}
    if operator == DEFAULT and kwargs:
        place = marks.get("replace.kwargs", replace_node.location)
        problems.add(place, "kwargs for `class: default`", "a kept module has none: remove them")
    expect = values.get("expect")
    where = {
        key: (str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in match_values.get("where", {}).items()
    }
    return Rule(
        id=entry.id,
        match=Match(
            name=match_values.get("name"),
            class_name=match_values.get("class"),
            role=match_values.get("role"),
            layers=match_values.get("layers"),
            where=where,
            tower=match_values.get("tower", "text"),
        ),
        replace=Replace(operator=operator or DEFAULT, device=device, kwargs=kwargs if isinstance(kwargs, Mapping) else {}),
        location=entry.location,
        recursive=values.get("recursive", True),
        optional=values.get("optional", False),
        expect=None if expect is None else str(expect),
        on_unavailable=values.get("on_unavailable", "error"),
        inherited=inherited,
        marks=marks,
        references=_references(replace_node),
    )


def _references(node: Node, path: str = "replace") -> dict[str, str]:
    """Which values are one reference and nothing else: what an override had better set."""
    if isinstance(node, Table):
        found: dict[str, str] = {}
        for key, child in node.entries.items():
            found |= _references(child, f"{path}.{key}")
        return found
    if isinstance(node, Leaf) and isinstance(node.value, str):
        whole = REFERENCE.fullmatch(node.value)
        return {path: f"{whole[1]}{whole[2]}"} if whole else {}
    return {}


def _operator(name: Any, entry: RuleEntry, place: Location, problems: Problems) -> str | None:
    known = [DEFAULT, *operator_table()]
    if name is None:
        return None  # a missing key, reported already
    if not isinstance(name, str):
        problems.add(place, f"the operator is {name!r}", "expected a name")
        return None
    if name in known:
        return name
    if "." in name or ":" in name:
        if entry.trusted:
            return name
        problems.add(
            place,
            f"the dotted class {name!r}: code outside the registry",
            "use a registered operator, or pass trust_code=True for a rule file of your own (presets can never)",
        )
        return None
    problems.add(place, f"no operator is registered as {name!r}", did_you_mean(name, known, otherwise="registered"))
    return None


_DEVICES = ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "meta")


def _device(device: Any, place: Location, problems: Problems) -> str | None:
    if device is None:
        return None
    if not isinstance(device, str):
        problems.add(place, f"the device is {device!r}", "expected a name such as cpu or cuda:0")
        return None
    kind, colon, index = device.partition(":")
    if kind not in _DEVICES or (colon and not (index.isascii() and index.isdigit())):
        hint = did_you_mean(kind, _DEVICES, otherwise="kinds")
        problems.add(place, f"the device {device!r}", f"expected cpu or a kind and a number such as cuda:0; {hint}")
        return None
    return device


def _collect_marks(node: Node | None, path: str, marks: dict[str, Location]) -> None:
    if isinstance(node, Table):
        for key, child in node.entries.items():
            below = f"{path}.{key}"
            marks[below] = child.location if isinstance(child, Leaf) else node.keys[key]
            _collect_marks(child, below, marks)
    elif isinstance(node, Items):
        for index, child in enumerate(node.items):
            marks[f"{path}[{index}]"] = child.location


__all__ = ["AUTO", "Requirement", "load_rules"]
