"""The JSON Schema that editors read, and rule sets written out again."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from numagraft.rulefile import load_rules, resolved, schema
from numagraft.rulefile.rules import Location

from .test_properties import GOOD
from .writing import ONE_NODE, write

SHIPPED = files("numagraft.rules") / "schema.json"


def written() -> str:
    return json.dumps(schema.json_schema(), indent=1) + "\n"


def test_the_shipped_schema_is_current():
    hint = "run: python -m tests.rulefile.test_schema"
    assert SHIPPED.read_text() == written(), hint


def test_every_preset_names_the_schema_in_its_first_line():
    root = Path(str(files("numagraft.rules")))
    presets = [*root.rglob("*.yaml"), *root.rglob("*.yaml.j2")]
    assert presets
    for path in presets:
        if path.name.endswith(".manifest.yaml"):
            continue
        depth = len(path.relative_to(root).parts) - 1
        assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={'../' * depth}schema.json", path


def without_places(rules):
    plain = {"source": "", "notes": (), "marks": {}, "files": (), "requires": ()}
    nowhere = Location("", 0, 0)
    return replace(
        rules,
        **plain,
        rules=tuple(
            replace(rule, location=nowhere, inherited=False, marks={}, references={}, id=rule.id if "." not in rule.id else "")
            for rule in rules.rules
        ),
    )


@pytest.mark.parametrize("text", [GOOD, "schema: 1\nextends: auto\n"])
def test_a_resolved_file_means_the_same(tmp_path, text):
    rules = load_rules(write(tmp_path, text), platform=ONE_NODE)
    again = load_rules(write(tmp_path, resolved.to_yaml(rules), "again.yaml"), platform=ONE_NODE)
    assert without_places(again) == without_places(rules)
    bare = load_rules(write(tmp_path, resolved.to_yaml(rules, origins=False), "bare.yaml"), platform=ONE_NODE)
    assert without_places(bare) == without_places(rules)


def test_a_resolved_file_says_where_each_value_comes_from(tmp_path):
    rules = load_rules(write(tmp_path, GOOD), platform=ONE_NODE, overrides=["vars.format=bf16"])
    text = resolved.to_yaml(rules)
    lines = {line.split("#")[0].strip(): line.rpartition("# ")[2] for line in text.splitlines()}
    assert lines["format: bf16"] == "--set vars.format=bf16" or "--set vars.format=bf16" in text
    assert any("family/generic.yaml:" in line for line in text.splitlines())
    assert any("rules.yaml:8" in line for line in text.splitlines())


if __name__ == "__main__":
    Path(str(SHIPPED)).write_text(written())
