"""extends, override, remove, vars, runtime, requires: each clause of the precedence."""

from __future__ import annotations

import pytest

from numagraft.errors import RuleError
from numagraft.rulefile import load_rules

from .writing import ONE_NODE, load, problems, write

HEAD = "schema: 1\n"
RULE = "  - {{id: {id}, match: {{role: {role}}}, replace: {{class: {cls}}}}}\n"


def rule(id: str, role: str = "linear", cls: str = "linear", **more: str) -> str:
    extra = "".join(f", {key}: {value}" for key, value in more.items())
    return f"  - {{id: {id}, match: {{role: {role}}}, replace: {{class: {cls}}}{extra}}}\n"


def ids(rules) -> list[str]:
    return [each.id for each in rules.rules]


def test_own_rules_come_first_then_the_last_listed_preset(tmp_path):
    write(tmp_path, HEAD + "rules:\n" + rule("a1") + rule("a2"), "a.yaml")
    write(tmp_path, HEAD + "rules:\n" + rule("b1"), "b.yaml")
    found = load(tmp_path, HEAD + "extends: [./a.yaml, ./b.yaml]\nrules:\n" + rule("own"))
    assert ids(found) == ["own", "b1", "a1", "a2"]
    assert [each.inherited for each in found.rules] == [False, True, True, True]


def test_a_base_reached_twice_counts_once_and_stays_farthest(tmp_path):
    write(tmp_path, HEAD + "vars: {x: base}\nrules:\n" + rule("base"), "base.yaml")
    write(tmp_path, HEAD + "extends: ./base.yaml\nvars: {x: a}\nrules:\n" + rule("a"), "a.yaml")
    write(tmp_path, HEAD + "extends: ./base.yaml\nrules:\n" + rule("b"), "b.yaml")
    found = load(tmp_path, HEAD + "extends: [./a.yaml, ./b.yaml]\n")
    assert ids(found) == ["b", "a", "base"]
    assert found.vars == {"x": "a"}


def test_override_takes_the_place_of_the_inherited_rule(tmp_path):
    write(tmp_path, HEAD + "rules:\n" + rule("one") + rule("two") + rule("three"), "a.yaml")
    text = HEAD + "extends: ./a.yaml\nrules:\n" + rule("new") + rule("two", cls="torch", override="true")
    found = load(tmp_path, text)
    assert ids(found) == ["new", "one", "two", "three"]
    assert found.rule("two").replace.operator == "torch"
    assert not found.rule("two").inherited


def test_a_duplicate_id_without_override_is_an_error(tmp_path):
    write(tmp_path, HEAD + "rules:\n" + rule("one"), "a.yaml")
    assert problems(tmp_path, HEAD + "extends: ./a.yaml\nrules:\n" + rule("one")) == [
        "4:6: the id 'one' is already that of a.yaml:3:5 | "
        "add `override: true` to take its place, or choose another id"
    ]


def test_remove_deletes_an_inherited_rule(tmp_path):
    write(tmp_path, HEAD + "rules:\n" + rule("one") + rule("two"), "a.yaml")
    assert ids(load(tmp_path, HEAD + "extends: ./a.yaml\nrules:\n  - {id: one, remove: true}\n")) == ["two"]
    assert problems(tmp_path, HEAD + "extends: ./a.yaml\nrules:\n  - {id: onee, remove: true}\n") == [
        "4:6: `remove` of 'onee', but no inherited rule has this id | did you mean 'one'?"
    ]


def test_the_nearer_file_wins_per_key_of_vars_and_runtime(tmp_path):
    write(tmp_path, HEAD + "vars: {x: 1, y: 1, deep: {a: 1, b: 1}}\nruntime: {pages: 4k, strict: false}\n", "a.yaml")
    write(tmp_path, HEAD + "vars: {y: 2}\nruntime: {pages: thp}\n", "b.yaml")
    text = HEAD + "extends: [./a.yaml, ./b.yaml]\nvars: {deep: {b: 3}, list: [1]}\nrules:\n" + rule("own")
    found = load(tmp_path, text)
    assert found.vars == {"x": 1, "y": 2, "deep": {"a": 1, "b": 3}, "list": [1]}
    assert (found.runtime.pages, found.runtime.strict) == ("thp", False)
    assert str(found.marks["vars.y"]).endswith("b.yaml:2:11")


def test_all_requirements_are_kept(tmp_path):
    write(tmp_path, HEAD + 'requires: {numa_nodes: ">=1", isa: avx2}\n', "a.yaml")
    found = load(tmp_path, HEAD + "extends: ./a.yaml\nrequires: {numa_nodes: 2}\nrules:\n" + rule("own"))
    assert [(each.key, str(each.value)) for each in found.requires] == [
        ("numa_nodes", "2"),
        ("numa_nodes", ">=1"),
        ("isa", "['avx2']"),
    ]


def test_interpolation_keeps_types_and_reaches_through_vars(tmp_path):
    text = (
        HEAD
        + "vars: {bits: 4, format: 'int${vars.bits}', group: '${vars.sizes.small}', sizes: {small: 32}}\n"
        + "rules:\n  - id: own\n    match: {role: linear}\n    replace:\n      class: linear\n"
        + "      kwargs: {format: '${vars.format}', group: '${vars.group}', pages: '${runtime.pages}'}\n"
    )
    assert load(tmp_path, text).rule("own").replace.kwargs == {"format": "int4", "group": 32, "pages": "auto"}


def test_overrides_come_last(tmp_path):
    text = HEAD + "vars: {f: int8}\nrules:\n  - id: own\n    match: {role: linear}\n    replace:\n      class: linear\n"
    text += "      kwargs: {format: '${vars.f}'}\n"
    assert load(tmp_path, text, overrides=["vars.f=bf16"]).rule("own").replace.kwargs == {"format": "bf16"}
    given = ["rules.own.replace.kwargs.format=int4", "rules.own.replace.kwargs.group=64", "runtime.pages=2m"]
    found = load(tmp_path, text, overrides=given)
    assert found.rule("own").replace.kwargs == {"format": "int4", "group": 64}
    assert found.runtime.pages == "2m"
    assert str(found.rule("own").mark("replace.kwargs.format")) == "--set rules.own.replace.kwargs.format=int4"
    assert load(tmp_path, text, overrides={"vars.f": "int4"}).vars == {"f": "int4"}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("vars.g=1", "no rule file defines the var 'g' | known vars: f"),
        ("f=1", "'f' cannot be set | write vars.NAME=VALUE, runtime.NAME=VALUE or rules.ID.replace.kwargs.NAME=VALUE"),
        ("vars.f", "no = in it | write vars.NAME=VALUE, runtime.NAME=VALUE or rules.ID.replace.kwargs.NAME=VALUE"),
        ("runtime.page=1", "runtime has no 'page' | did you mean 'pages'?"),
        ("rules.onw.optional=true", "no rule has the id 'onw' | did you mean 'own'?"),
        ("rules.own.optional=yes", "found the text 'yes', expected true or false | write true: yes is text"),
        ("runtime.pages=3m", "found the text '3m', expected one of auto, 4k, thp, 2m, 1g | "),
    ],
)
def test_wrong_overrides_are_errors(tmp_path, override, problem):
    text = HEAD + "vars: {f: int8}\nrules:\n" + rule("own")
    assert problems(tmp_path, text, overrides=[override]) == [f"--set {override}: {problem}"]


def test_rules_from_python():
    found = load_rules([{"match": {"role": "linear"}, "replace": {"class": "linear", "kwargs": {"group": 32}}}])
    assert ids(found) == ["rule-1"]
    with pytest.raises(RuleError, match=r"rules: rules\[0\]\.match\.rolle: unknown key 'rolle' in match"):
        load_rules({"rules": [{"match": {"rolle": "linear"}, "replace": {"class": "linear"}}]})


def test_a_ruleset_passes_through_but_takes_no_overrides():
    found = load_rules([{"match": {"role": "linear"}, "replace": {"class": "linear"}}])
    assert load_rules(found) is found
    with pytest.raises(RuleError, match="resolved already"):
        load_rules(found, overrides=["vars.x=1"])


def test_extends_stays_in_the_folder(tmp_path):
    write(tmp_path, HEAD, "outside.yaml")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    for name in ("../outside.yaml", "./link.yaml", str(tmp_path / "outside.yaml"), "~/x.yaml", "./../inside/../outside.yaml"):
        found = problems(inside, HEAD + f"extends: ['{name}']\nrules:\n" + rule("own"))
        assert len(found) == 1 and "leads out of the rule file's own folder" in found[0], found


def test_a_cycle_is_named(tmp_path):
    write(tmp_path, HEAD + "extends: ./b.yaml\n", "a.yaml")
    write(tmp_path, HEAD + "extends: ./a.yaml\n", "b.yaml")
    with pytest.raises(RuleError, match=r"extends itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_rules(tmp_path / "a.yaml", platform=ONE_NODE)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${name:x}", "${runtime.nodes:1}", "${rules.a}", "${vars}"])
@pytest.mark.parametrize("where", ["vars", "replace"])
def test_resolvers_and_other_scopes_are_refused(text, where):
    given = {"vars": {"a": text if where == "vars" else 1}, "rules": [{"id": "x", "match": {"role": "linear"}}]}
    given["rules"][0]["replace"] = {"class": "linear", "kwargs": {"format": text if where == "replace" else "int8"}}
    with pytest.raises(RuleError) as caught:
        load_rules(given, platform=ONE_NODE)
    assert text in str(caught.value)
