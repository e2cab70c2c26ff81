"""Which rule decides which module; counting and shadowing."""

from __future__ import annotations

import pytest

from numagraft.errors import RuleError
from numagraft.matching import match
from numagraft.rulefile import load_rules

from .small import dense, moe


def run(model, *rules):
    entries = [{"replace": {"class": "linear"}, **rule} for rule in rules]
    found = match(model, load_rules(entries))
    return {decision.info.name: decision.rule.id for decision in found.decisions if decision.rule is not None}


def fails(model, *rules) -> str:
    with pytest.raises(RuleError) as caught:
        run(model, *rules)
    return str(caught.value)


def test_the_first_rule_whose_conditions_hold_decides():
    decided = run(
        dense(),
        {"id": "first", "match": {"role": "linear", "layers": "1"}},
        {"id": "rest", "match": {"class": "Linear", "role": "linear"}},
    )
    assert {name for name, id_ in decided.items() if id_ == "first"} == {
        name for name in decided if name.startswith("model.layers.1.")
    }
    assert len(decided) == 3 * 7 and "lm_head" not in decided


def test_all_conditions_must_hold():
    decided = run(dense(), {"match": {"name": r".*\.(q|k)_proj", "where": {"out_features": ">=64"}, "layers": "0-1"}})
    assert sorted(decided) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_a_replaced_module_owns_its_subtree_and_the_walk_is_in_pre_order():
    model = moe()
    rules = load_rules(
        [
            {"id": "block", "match": {"role": "moe", "layers": "0"}, "replace": {"class": "torch"}},
            {"id": "experts", "match": {"role": "experts"}, "replace": {"class": "experts"}},
        ]
    )
    found = match(model, rules)
    assert found.decided["experts"] == ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts")
    assert len(found.satisfied["experts"]) == 3
    owned = [decision for decision in found.decisions if decision.owner == "model.layers.0.mlp"]
    assert "model.layers.0.mlp.experts" in [decision.info.name for decision in owned]


def test_recursive_false_stops_below_a_kept_module():
    keep = {"id": "keep", "match": {"role": "decoder_layer", "layers": "0"}, "replace": {"class": "default"}}
    assert len(run(dense(), keep, {"match": {"role": "linear"}})) == 1 + 21
    assert len(run(dense(), {**keep, "recursive": False}, {"match": {"role": "linear"}})) == 1 + 14


def test_a_rule_takes_the_text_tower_unless_told():
    from tests.roles import families

    model = families.build("Gemma 3")

    def towers(**condition):
        return {"vision" if "vision" in name or "projector" in name else "text" for name in run(model, {"match": condition})}

    assert towers(role="linear") == towers(role="linear", tower="text") == {"text"}
    assert towers(role="linear", tower="vision") == {"vision"}
    assert towers(role="linear", tower="any") == {"text", "vision"}


def test_a_rule_that_gives_way_to_none_leaves_the_module_and_goes_into_its_children():
    rules = [
        {"id": "blocks", "match": {"role": "moe"}, "replace": {"class": "experts"}, "on_unavailable": "keep"},
        {"id": "later", "match": {"role": "moe"}, "replace": {"class": "torch"}, "optional": True},
        {"id": "experts", "match": {"role": "experts"}, "replace": {"class": "experts"}, "optional": True},
    ]

    def decided(verdict):
        def judge(info, rule):
            return verdict if rule.id == "blocks" else "take"

        return {id_: len(names) for id_, names in match(moe(), load_rules(rules), judge=judge).decided.items()}

    assert decided("keep") == {"blocks": 0, "later": 0, "experts": 3}, "the children are looked at, later rules are not"
    assert decided("next") == {"blocks": 0, "later": 3, "experts": 0}
    rules[1]["optional"] = False
    with pytest.raises(RuleError, match=r"'later' is shadowed: .* is taken by 'blocks', or kept by its `on_unavailable: keep`"):
        decided("keep")


def test_class_goes_through_bases_and_packages():
    for name in ("torch.nn.Linear", "torch.nn.modules.linear.Linear", "Linear"):
        assert len(run(dense(), {"match": {"class": name}})) == 22
    assert len(run(dense(), {"match": {"class": "GradientCheckpointingLayer"}, "replace": {"class": "torch"}})) == 3


def test_names_are_matched_whole():
    assert "names are matched whole, add '.*'" in fails(dense(), {"match": {"name": "q_proj"}})


@pytest.mark.parametrize(
    ("condition", "hint"),
    [
        ({"role": "experts"}, "no module has the role experts; roles here: attention, decoder_layer,"),
        ({"class": "Linaer"}, "no module is a Linaer; did you mean 'Linear'?"),
        ({"role": "linear", "layers": "7"}, "nothing of that is in these layers; there are layers 0-2"),
        ({"role": "linear", "tower": "vision"}, "the model has no vision tower (it has text)"),
        ({"name": r"model\.layer\.0\.mlp"}, "did you mean 'model.layers.0.mlp'?"),
        ({"role": "linear", "where": {"in_features": ">9999"}}, "no module satisfies where {'in_features': '>9999'}"),
    ],
)
def test_a_rule_that_matches_nothing_says_why(condition, hint):
    text = fails(dense(), {"id": "lost", "match": condition})
    assert "rule 'lost' matches nothing" in text and hint in text
    assert run(dense(), {"id": "lost", "match": condition, "optional": True}) == {}


def test_expect_counts_modules_that_others_took():
    rules = [
        {"id": "all", "match": {"role": "linear"}},
        {"id": "q", "match": {"name": r".*\.q_proj"}, "expect": 3, "optional": True},
    ]
    run(dense(), *rules)
    rules[1]["expect"] = ">=4"
    assert "rule 'q' matches 3 modules, expected >=4" in fails(dense(), *rules)


def test_a_shadowed_rule_is_an_error_and_only_a_note_when_inherited(tmp_path):
    rules = [{"id": "all", "match": {"role": "linear"}}, {"id": "q", "match": {"name": r".*\.q_proj"}}]
    assert "rule 'q' is shadowed: everything that it matches is taken by 'all'" in fails(dense(), *rules)
    base = "schema: 1\nrules:\n  - {id: q, match: {name: '.*q_proj'}, replace: {class: linear}}\n"
    (tmp_path / "base.yaml").write_text(base)
    own = "schema: 1\nextends: ./base.yaml\nrules:\n  - {id: all, match: {role: linear}, replace: {class: linear}}\n"
    (tmp_path / "own.yaml").write_text(own)
    found = match(dense(), load_rules(tmp_path / "own.yaml"))
    assert len(found.notes) == 1 and "rule 'q' is shadowed" in found.notes[0]


def test_a_rule_under_a_replaced_ancestor_is_shadowed():
    rules = [
        {"id": "q", "match": {"name": r".*\.q_proj"}},
        {"id": "layers", "match": {"role": "decoder_layer"}, "replace": {"class": "torch"}},
    ]
    assert "rule 'q' is shadowed: everything that it matches is taken by 'layers'" in fails(dense(), *rules)


def test_an_exploding_pattern_is_stopped():
    bomb = "(?:[a-z0-9_.]|[a-z0-9_.])*[XY]"
    text = fails(dense(num_hidden_layers=40), {"id": "bomb", "match": {"name": bomb}})
    assert f"the pattern '{bomb}' takes too long over" in text
