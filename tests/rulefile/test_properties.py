"""Whatever the text: a RuleSet or a RuleError with places, never anything else."""

from __future__ import annotations

import re

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numagraft.errors import RuleError
from numagraft.rulefile import RuleSet, load_rules
from numagraft.rulefile.comparison import Comparison
from numagraft.rulefile.nodes import parse, plain
from numagraft.rulefile.pattern import NamePattern, Names, PatternError, PatternTimeout

from .writing import ONE_NODE, write

GOOD = """schema: 1
description: everything there is
extends: [family/generic]
requires: {numa_nodes: ">=1", isa: [avx2]}
vars: {format: int4, deep: {a: '${vars.format}'}}
runtime: {nodes: all, pages: auto}
rules:
  - id: own
    match: {name: '.*\\.q_proj', class: Linear, layers: "0-2,5", where: {in_features: ">=512"}}
    replace: {class: linear, device: cpu, kwargs: {format: '${vars.deep.a}', placement: {policy: mirror, nodes: [0]}}}
    optional: true
  - {id: linear, remove: true}
"""

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12))
words = st.sampled_from([*re.findall(r"\w+", GOOD), "${vars.format}", "${", "???", "..", "", "1e3", "yes", ">=2"])
trees = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=5), inner, max_size=4),
    max_leaves=25,
)


def outcome(source, **options):
    try:
        found = load_rules(source, platform=ONE_NODE, **options)
    except RuleError as error:
        assert error.problems
        assert all(problem.where and problem.message for problem in error.problems)
        return error
    assert isinstance(found, RuleSet)
    return found


def test_the_good_file_is_good(tmp_path):
    assert isinstance(outcome(write(tmp_path, GOOD)), RuleSet)


@relaxed
@given(text=st.text(max_size=300))
def test_any_text(tmp_path, text):
    write(tmp_path, "").write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome(tmp_path / "rules.yaml")


@relaxed
@given(begin=st.integers(0, len(GOOD)), length=st.integers(0, 12), text=st.text(max_size=6))
def test_a_good_file_with_a_piece_changed(tmp_path, begin, length, text):
    changed = GOOD[:begin] + text + GOOD[begin + length :]
    write(tmp_path, "").write_bytes(changed.encode("utf-8", "surrogatepass"))
    outcome(tmp_path / "rules.yaml")


@relaxed
@given(tree=st.dictionaries(st.sampled_from(["rules", "vars", "runtime", "requires", "extends", "schema"]), trees))
def test_any_python_data(tree):
    outcome(tree)


@relaxed
@given(path=st.text(max_size=20) | words, value=st.text(max_size=10))
def test_any_override(path, value):
    rules = [{"id": "own", "match": {"role": "linear"}, "replace": {"class": "linear", "kwargs": {"format": "int8"}}}]
    outcome(rules, overrides=[f"{path}={value}", f"rules.own.replace.kwargs.format={value}"])


@given(
    data=st.recursive(
        st.booleans() | st.integers(-99, 99) | st.text("abc x", min_size=1, max_size=5).map(str.strip).filter(bool),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, min_size=1, max_size=3)
        ),
    )
)
@settings(max_examples=100, deadline=None)
def test_nodes_read_what_yaml_writes(data):
    assert plain(parse(yaml.safe_dump(data), file="x")) == data


@given(
    terms=st.lists(
        st.tuples(st.sampled_from([">=", "<=", "==", "!=", ">", "<"]), st.integers(0, 9)), min_size=1, max_size=3
    )
)
def test_comparisons_hold_as_python_says(terms):
    compared = Comparison.parse(", ".join(f"{symbol} {bound}" for symbol, bound in terms))
    for number in range(10):
        assert compared.holds(number) == all(eval(f"{number}{symbol}{bound}") for symbol, bound in terms)


PARTS = ("mlp", "mlp.experts", "self_attn.q_proj")
NAMES = ("lm_head", *(f"model.layers.{i}.{part}" for i in range(12) for part in PARTS))
pieces = st.sampled_from(
    [
        r"model",
        r"\.",
        ".",
        "layers",
        r"\d+",
        r"\d",
        "[0-9]",
        "[^.]+",
        ".*",
        "mlp",
        "(?!1)",
        "(?:",
        ")",
        "|",
        "^",
        "$",
        "1",
        r"\w+",
        r"\W",
        r"\s",
        r"\D+",
        "(?s)",
        "(?<=s.)",
        "experts",
        "+",
        "?",
        "{1,2}",
        r"\Z",
        r"\A",
        r"\b",
        "[^a-z]*",
        "(",
        "*",
    ]
)


@given(pattern=st.lists(pieces, min_size=1, max_size=9).map("".join))
@settings(max_examples=600, deadline=None)
def test_the_joined_scan_finds_what_a_full_match_of_every_name_finds(pattern):
    try:
        compiled = NamePattern.compile(pattern)
    except PatternError:
        return
    try:
        found = compiled.scan(Names.of(NAMES))
    except PatternTimeout:
        return
    assert [NAMES[index] for index in found] == [name for name in NAMES if re.fullmatch(pattern, name)]
