"""plan, diff, explain, lint, init and rules, as a person types them: output, JSON and exit codes."""

from __future__ import annotations

import importlib
import json

import pytest
import typer
from transformers import AutoConfig
from typer.testing import CliRunner

from numagraft import presets, registry
from numagraft.errors import ConfigurationError, PlanError, RuleError
from tests.planning import small

GOOD = "schema: 1\nextends: [family/auto, platform/auto]\nvars: {format: int4}\n"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.OPERATORS, "linear", "tests.planning.packing_stand_ins:LinearStandIn")
    monkeypatch.setitem(registry.OPERATORS, "experts", "tests.planning.packing_stand_ins:ExpertsStandIn")
    monkeypatch.setenv(presets.HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    registry.operator_table.cache_clear()
    yield
    registry.operator_table.cache_clear()


@pytest.fixture
def model(tmp_path):
    """A model's folder that holds a configuration and nothing else."""
    config = AutoConfig.for_model("qwen3_moe", **small.DENSE, **small.MOE)
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def numagraft(*arguments: str):
    app = typer.Typer()
    for command in ("plan", "explain", "lint", "rules"):
        importlib.import_module(f"numagraft.cli.{command}_command").register(app)
    return CliRunner().invoke(app, list(arguments))


def test_plan(model, tmp_path):
    shown = numagraft("plan", model)
    assert shown.exit_code == 0, shown.output
    for piece in ("model.layers.{0-2}.mlp.experts", "qwen3-moe.yaml", "Prediction, not a measurement", "int8"):
        assert piece in shown.output
    data = json.loads(numagraft("plan", model, "--set", "vars.format=int4", "--json").output)
    assert {module["format"] for module in data["modules"] if module["rule_id"] == "experts"} == {"int4"}
    assert data["prediction"]["assumptions"] and data["schema"] == 2
    (tmp_path / "rules.yaml").write_text(GOOD)
    resolved = numagraft("plan", model, "-r", "rules.yaml", "--resolved").output
    assert "format: int4" in resolved and "# rules.yaml:3:16" in resolved


def test_plan_refuses(model, tmp_path):
    (tmp_path / "rules.yaml").write_text("schema: 1\nrules:\n  - match: {rol: linear}\n    replace: {class: liner}\n")
    shown = numagraft("plan", model, "-r", "rules.yaml")
    assert isinstance(shown.exception, RuleError)
    assert [str(problem).split(":")[1:3] for problem in shown.exception.problems] == [
        ["3", "12"],
        ["3", "13"],
        ["4", "22"],
    ]
    shown = numagraft("plan", model, "--set", "rules.experts.replace.kwargs.placement={policy: mirror, nodes: [77]}")
    assert isinstance(shown.exception, PlanError) and "77" in str(shown.exception)


def test_diff(model, tmp_path):
    (tmp_path / "rules.yaml").write_text(GOOD)
    shown = numagraft("diff", "auto", "rules.yaml", "-m", model)
    assert shown.exit_code == 1 and "experts int8" in shown.output and "experts int4" in shown.output
    same = numagraft("diff", "auto", "auto", "-m", model)
    assert same.exit_code == 0 and "no difference" in same.output
    assert len(json.loads(numagraft("diff", "auto", "rules.yaml", "-m", model, "--json").output)["changes"]) == 15


def test_explain(model):
    shown = numagraft("explain", model, "model.layers.1.mlp.gate")
    assert (
        shown.exit_code == 0
        and "kept: no rule decides it" in shown.output
        and "✗ role: experts  [router]" in shown.output
    )
    data = json.loads(numagraft("explain", model, "lm_head", "--json").output)
    assert data["decision"] == "rule 'lm_head' replaced by linear on cpu"
    assert isinstance(numagraft("explain", model, "nowhere").exception, ConfigurationError)


def test_init_then_lint(model, tmp_path):
    assert numagraft("init", model).exit_code == 0
    assert isinstance(numagraft("init", model).exception, ConfigurationError), "an existing file is not replaced"
    assert numagraft("init", model, "--force").exit_code == 0
    clean = numagraft("lint", "rules.yaml", "-m", model, "--strict")
    assert clean.exit_code == 0 and "0 errors, 0 warnings, 0 notes" in clean.output
    bad = "schema: 1\nrules:\n  - match: {name: 'model.layers.0.*'}\n    replace: {class: torch}\n"
    (tmp_path / "bad.yaml").write_text(bad)
    assert numagraft("lint", "bad.yaml").exit_code == 0
    strict = numagraft("lint", "bad.yaml", "--strict")
    assert (
        strict.exit_code == 1 and "bad.yaml:3:19: warning: rule 'bad.yaml:3': the dot at character 6" in strict.output
    )
    (tmp_path / "wrong.yaml").write_text("schema: 1\nrules:\n  - match: {role: moee}\n    replace: {class: torch}\n")
    wrong = numagraft("lint", "wrong.yaml", "--json")
    assert wrong.exit_code == 1 and json.loads(wrong.output)["worst"] == "error"
    (tmp_path / "none.yaml").write_text("schema: 1\nrules:\n  - match: {role: mlp}\n    replace: {class: torch}\n")
    none = numagraft("lint", "none.yaml", "-m", model)
    assert none.exit_code == 1 and "matches nothing" in none.output


def test_rules_list_show_match(model):
    names = [row["name"] for row in json.loads(numagraft("rules", "list", "--json").output)]
    assert "family/gpt-oss" in names and "platform/epyc-nps1" in names
    assert "planned, not measured" in numagraft("rules", "list").output
    assert "# firmware:" in numagraft("rules", "show", "platform/epyc-nps1").output
    assert "family/generic.yaml:" in numagraft("rules", "show", "auto", "--resolved").output
    ranked = json.loads(numagraft("rules", "match", model, "--json").output)
    assert {row["name"] for row in ranked[:2]} >= {"family/qwen3-moe"}
    assert any("requires model_type" in row["why"] for row in ranked if not row["fits"])


def test_rules_validate_pack_add_remove(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "small.yaml").write_text(GOOD)
    shown = numagraft("rules", "validate", "mine")
    assert shown.exit_code == 1 and "has no manifest" in shown.output
    manifest = "schema: 1\nstatus: planned, not measured\nmemory: m\nfirmware: f\nvalidated_on: []\n"
    (folder / "small.manifest.yaml").write_text(manifest)
    assert numagraft("rules", "validate", "mine").exit_code == 0
    assert numagraft("rules", "pack", "mine").exit_code == 0
    assert "added mine/small" in numagraft("rules", "add", "mine.tar.gz").output
    assert "int4" in numagraft("rules", "show", "mine/small", "--resolved").output
    assert "removed mine/small" in numagraft("rules", "remove", "mine").output


def test_rules_import(tmp_path):
    old = "- match: {name: '^lm_head'}\n  replace: {class: default, kwargs: {generate_device: cpu, odd: 1}}\n"
    (tmp_path / "old.yaml").write_text(old)
    shown = numagraft("rules", "import", "old.yaml")
    assert shown.exit_code == 0 and "match: {name: 'lm_head.*'}" in shown.output
    assert "not taken along: old.yaml:1:3: the kwarg 'odd'" in shown.output + shown.stderr
    assert numagraft("rules", "import", "old.yaml", "-o", "new.yaml").exit_code == 0
    assert "class: experts" in numagraft("rules", "import", "-ot", "exps=CPU").output
    assert "format: int8" in numagraft("rules", "import", "--kt-flags", "--kt-method AMXINT8").output
    assert isinstance(numagraft("rules", "import").exception, ConfigurationError)


def test_the_schema_is_printed():
    assert json.loads(numagraft("rules", "schema").output)["properties"]["schema"] == {
        "const": 1,
        "description": "version of this language",
    }
