"""Every example of docs/rules.md does what its first line says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from numagraft import registry
from numagraft.errors import NumagraftError
from numagraft.planning import make_plan
from numagraft.platform import Platform
from numagraft.rulefile import load_rules
from tests.planning import small

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rules.md"
BLOCKS = re.findall(r"```(yaml|jinja)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
TWO = Platform.virtual(2, cores_per_node=4)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setitem(registry.OPERATORS, "linear", "tests.planning.packing_stand_ins:LinearStandIn")
    monkeypatch.setitem(registry.OPERATORS, "experts", "tests.planning.packing_stand_ins:ExpertsStandIn")
    registry.operator_table.cache_clear()
    yield
    registry.operator_table.cache_clear()


@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=lambda value: value.splitlines()[0][2:60])
def test_the_example_does_what_it_says(language, text, tmp_path):
    first = text.splitlines()[0]
    said = re.fullmatch(r"# (on|refused on) (dense|moe): (.*)", first)
    assert said, f"{first!r} does not say on what it is tried"
    model = getattr(small, said[2])()
    path = tmp_path / ("rules.yaml" if language == "yaml" else "rules.yaml.j2")
    path.write_text(text)

    def plan():
        rules = load_rules(path, platform=TWO, config=model.config)
        return rules, make_plan(model, rules, TWO)

    if said[1] == "refused on":
        with pytest.raises(NumagraftError, match=re.escape(said[3])):
            plan()
        return
    rules, made = plan()
    from numagraft.matching import match
    from numagraft.rulefile.problems import Problems

    decided = match(model, rules, problems=Problems()).decided
    wanted = dict(part.rsplit(" ", 1) for part in said[3].split(", "))
    for rule_id, count in wanted.items():
        replaced = sum(module.rule_id == rule_id for module in made.modules)
        assert int(count) in (replaced, len(decided[rule_id])), f"{rule_id}: {replaced}"


def test_every_feature_has_an_example():
    text = "".join(block for _, block in BLOCKS)
    for feature in (
        "name:",
        "class: torch.nn",
        "role:",
        "layers:",
        "where:",
        "tower:",
        "recursive:",
        "optional:",
        "expect:",
        "on_unavailable:",
        "override:",
        "remove:",
        "extends:",
        "requires:",
        "vars:",
        "runtime:",
        "${vars.",
        "device:",
        "budget:",
        "{% for",
    ):
        assert feature in text, feature
