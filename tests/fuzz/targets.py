"""What is fuzzed: each target takes bytes, and may refuse them with one of our errors; anything else is a finding.

Used by `drive.py` (with atheris) and by the tests that replay what was found (without it).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numagraft.errors import NumagraftError
from numagraft.platform import Platform

#: seconds of processor time that one input may take: instrumentation included
MAX_SECONDS = 2.0
#: that an input must be slow in
RUNS = 3

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = Platform.virtual(2, cores_per_node=2)
NAMES = [f"model.layers.{i}.{part}" for i in range(64) for part in ("self_attn.q_proj", "mlp.experts", "mlp.gate")]


class SlowInput(Exception):
    """An input took longer than it may."""


@functools.cache
def _folder() -> Path:
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="numagraft-fuzz-", dir=shared if shared.is_dir() else None))


def rules(data: bytes) -> None:
    """A rule file: read, composed, resolved, printed, its patterns tried."""
    from numagraft.rulefile import load_rules
    from numagraft.rulefile.pattern import NamePattern, Names, PatternTimeout
    from numagraft.rulefile.resolved import to_yaml

    path = _folder() / "rules.yaml"
    path.write_bytes(data)
    loaded = load_rules(path, platform=PLATFORM)
    to_yaml(loaded)
    for rule in loaded.rules:
        if rule.match.name is not None and not rule.inherited:
            try:
                NamePattern.compile(rule.match.name).scan(Names.of(NAMES))
            except PatternTimeout:
                return  # matching stops at the first one that takes too long


#: what makes a template do more work than its text is long: such ones are rendered only in the bounded child
_WORK = re.compile(r"for|macro|call|\*|range|~|\||\(|format|%[^}]*%(?!\})", re.DOTALL)


def templates(data: bytes) -> None:
    """A template: compiled here, rendered here where it cannot loop, else now and then in its child; then read as rules."""
    from jinja2 import TemplateError

    from numagraft.rulefile import template, template_sandbox
    from numagraft.rulefile.document import read_document
    from numagraft.rulefile.nodes import decode, parse
    from numagraft.rulefile.problems import Problems

    text = decode(data, file="fuzz.yaml.j2")
    if _WORK.search(text):
        with contextlib.suppress(TemplateError, RecursionError):
            template_sandbox.environment().from_string(text)
        if sum(data) % 251:
            return
        rendered = template.render(text, file="fuzz.yaml.j2", platform=PLATFORM)
        lines: Any = rendered.lines
        text = rendered.text
    else:
        answer = template_sandbox.render({"text": text, "context": template.facts(PLATFORM), "max_bytes": 1 << 20})
        if "error" in answer:
            assert isinstance(answer["line"], int) and answer["error"]
            return
        text, lines = answer["text"], answer["lines"]
        assert len(lines) == text.count("\n") + 1
    problems = Problems()
    read_document(parse(text, file="fuzz.yaml.j2", line_map=lines), file="fuzz", problems=problems, trusted=False)


def plans(data: bytes) -> None:
    """A plan file, and the same with a checksum that holds, held against a model."""
    from numagraft.errors import PlanError
    from numagraft.plans import plan_json
    from numagraft.plans.verification import fit_to

    text = data.decode("utf-8", errors="replace")
    try:
        plan = plan_json.load(text)
    except PlanError as error:
        found = re.search(r"expected ([0-9a-f]{16})\.\.\.", str(error))
        if found is None:
            raise
        checksum = plan_json.checksum
        plan_json.checksum = lambda plan: json.loads(text).get("sha256")  # type: ignore[assignment]
        try:
            plan = plan_json.load(text)
        finally:
            plan_json.checksum = checksum
    again = plan_json.load(plan_json.dump(plan))
    assert again == plan or plan != plan, "a plan does not survive JSON"
    fit_to(plan, _model(), PLATFORM)


@functools.cache
def _model() -> Any:
    from tests.planning.small import moe

    return moe(num_hidden_layers=1)


def imports(data: bytes) -> None:
    """KTransformers' rules and flags, llama.cpp's override strings, manifests, overrides, placements: the first byte says."""
    from numagraft.placement import parse as parse_placement
    from numagraft.rulefile import ktransformers, load_rules
    from numagraft.rulefile.manifest import read_manifest
    from numagraft.rulefile.nodes import decode, plain_scalar

    kind, text = data[:1], decode(data[1:], file="fuzz")
    if kind == b"k":
        _readable(ktransformers.convert(text, file="fuzz.yaml"))
    elif kind == b"f":
        _readable(ktransformers.convert_flags(text.split()))
    elif kind == b"t":
        _readable(ktransformers.convert_tensor_overrides([text]))
    elif kind == b"m":
        read_manifest(text, file="fuzz.manifest.yaml")
    elif kind == b"p":
        parse_placement(plain_scalar(text))
    else:
        load_rules("family/generic", overrides=text.split("\n"), platform=PLATFORM)


def _readable(converted: Any) -> None:
    """What a conversion writes is YAML of ours, and says nothing that the old file did not mean: one document, its keys."""
    from numagraft.rulefile import load_rules
    from numagraft.rulefile.nodes import Table, parse

    try:
        tree = parse(converted.text, file="converted.yaml")
    except NumagraftError as error:
        raise AssertionError(f"a conversion writes what cannot be read: {error}") from error
    assert isinstance(tree, Table)
    assert set(tree.entries) <= {"schema", "description", "extends", "vars", "runtime", "rules"}, list(tree.entries)
    path = _folder() / "converted.yaml"
    path.write_text(converted.text, encoding="utf-8")
    load_rules(path, platform=PLATFORM)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "rules": rules,
    "templates": templates,
    "plans": plans,
    "imports": imports,
}


def run(target: Callable[[bytes], None], data: bytes) -> None:
    """One input. Raises whatever is not one of our errors, and SlowInput.

    An input that is slow must be so three times: a virtual machine that its host pauses, or memory that must be found first,
    count as processor time too.
    """
    slow: list[float] = []
    while len(slow) < RUNS:
        taken = _seconds(target, data)
        if taken <= MAX_SECONDS:
            return
        slow.append(taken)
    raise SlowInput(f"{min(slow):.1f} s for {len(data)} bytes")


def _seconds(target: Callable[[bytes], None], data: bytes) -> float:
    begin = time.process_time()
    with contextlib.suppress(NumagraftError):
        target(data)
    return time.process_time() - begin


def seeds(name: str) -> list[bytes]:
    """Inputs to start from: the shipped presets, the tests' good and bad files, real plans."""
    if name in ("rules", "templates"):
        suffix = "*.yaml" if name == "rules" else "*.j2"
        found = [path.read_bytes() for path in sorted((ROOT / "rules").rglob(suffix)) if "manifest" not in path.name]
        docs = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
        fence = "yaml" if name == "rules" else "jinja"
        found += [block.encode() for block in re.findall(rf"```{fence}\n(.*?)```", docs, re.DOTALL)]
        if name == "rules":
            bad = (ROOT / "tests" / "rulefile" / "bad_files.txt").read_text(encoding="utf-8")
            found += [b.partition("\n")[2].partition("--- says\n")[0].encode() for b in bad.split("=== ")[1:]]
        return found
    if name == "plans":
        return [plan.to_json().encode() for plan in _plans()]
    manifests = sorted((ROOT / "rules").rglob("*.manifest.yaml"))
    old = ROOT / "tests" / "rulefile" / "test_ktransformers.py"
    theirs = re.findall(r'"""(.*?)"""', old.read_text(encoding="utf-8"), re.DOTALL)
    return [
        *(b"m" + path.read_bytes() for path in manifests[:3]),
        *(b"k" + text.encode() for text in theirs),
        b"f--kt-method AMXINT4 --kt-cpuinfer 64 --kt-threadpool-count 2 --kt-num-gpu-experts 4",
        b"texps=CPU",
        rb"tblk\.(1[0-9])\.ffn_.*_exps.=CPU,attn=CUDA0",
        b"ovars.format=int4\nrules.linear.replace.kwargs.group=64\nruntime.pages=2m",
        b"p{policy: mirror, nodes: [0, 1], budget: 3GiB}",
        b"pmirror",
    ]


def _plans() -> list[Any]:
    from numagraft.planning import make_plan
    from numagraft.rulefile import load_rules

    model = _model()
    made = []
    for placement in ("shard", "mirror", "interleave"):
        loaded = load_rules("auto", platform=PLATFORM, config=model.config, overrides=[f"vars.placement={placement}"])
        made.append(make_plan(model, loaded, PLATFORM))
    return [*made, replace(made[0], modules=made[0].modules[:1])]


@dataclass(frozen=True)
class Vocabulary:
    """What one kind of mapping may hold: all its keys, and an entry per word that one of them may take."""

    keys: frozenset[str]
    entries: list[tuple[str, Any]]


def vocabulary() -> list[Vocabulary]:
    """Of a rule file's mappings, from the schema."""
    from numagraft.rulefile import schema

    found = []
    for record in (schema.FILE, schema.RULE, schema.MATCH, schema.REPLACE, schema.RUNTIME):
        types = {key: field.type for key, field in record.fields.items()}
        entries = [(key, word) for key, type_ in types.items() for word in getattr(type_, "words", ())]
        entries += [(key, v) for key, type_ in types.items() if isinstance(type_, schema.Boolean) for v in (True, False)]
        found.append(Vocabulary(frozenset(types), entries))
    return found


def words(name: str) -> list[str]:
    """The target's own vocabulary."""
    from numagraft.rulefile import schema

    if name == "plans":
        return [
            '"modules"',
            '"layout"',
            '"placement"',
            '"parts"',
            "null",
            "true",
            "-1",
            "1e999",
            "NaN",
            '"cuda:1"',
            "[]",
        ]
    known = [
        "${vars.",
        "${runtime.",
        "}",
        ">=1",
        '"0-2,5"',
        "auto",
        "default",
        "mirror",
        "!!python/object",
        "&a",
        "*a",
        "<<",
    ]
    known += ["{{ ", " }}", "{% for n in platform.nodes %}", "{% endfor %}", "(a+)+$", "[^", "\\d", "(?P<x>", "{2,1}"]
    for record in (schema.FILE, schema.RULE, schema.MATCH, schema.REPLACE, schema.RUNTIME):
        known += [f"{key}: " for key in record.fields]
    return known
