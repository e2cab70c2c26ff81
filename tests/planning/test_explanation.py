"""Explain, lint, diff, init and predictions, each with something to find and something not to find."""

from __future__ import annotations

from dataclasses import replace

import pytest

from numagraft.errors import ConfigurationError
from numagraft.planning import make_plan
from numagraft.plans.difference import difference
from numagraft.plans.explanation import explain
from numagraft.plans.lint import lint, worst
from numagraft.plans.prediction import predict
from numagraft.plans.starting_file import starting_file
from numagraft.platform import Platform
from numagraft.rulefile import load_rules

from .small import dense, moe

TWO = Platform.virtual(2, cores_per_node=4, memory_per_node=8 << 30)
SNC = Platform.virtual(4, sockets=2, cores_per_node=4, memory_per_node=8 << 30)


def rules(*entries, **more):
    return load_rules({"rules": [{"replace": {"class": "linear"}, **entry} for entry in entries], **more}, platform=TWO)


def test_every_rule_is_explained_condition_by_condition():
    loaded = rules(
        {"id": "part", "match": {"name": "q_proj"}, "optional": True},
        {"id": "other", "match": {"role": "linear", "layers": "1-2", "where": {"out_features": ">=9999"}}, "optional": True},
        {"id": "norms", "match": {"class": "LlamaAttention"}, "optional": True, "on_unavailable": "next"},
        {"id": "own", "match": {"class": "Linear", "role": "linear"}},
        {"id": "later", "match": {"name": ".*q_proj"}, "optional": True},
    )
    found = explain(dense(), loaded, TWO, "model.layers.0.self_attn.q_proj")
    assert (found.class_name, found.role, found.layer) == ("Linear", "linear", 0)
    assert found.decision == "rule 'own' replaced by linear on cpu"
    outcomes = {verdict.rule_id: verdict.outcome for verdict in found.verdicts}
    assert outcomes["own"] == "decides: replaced by linear on cpu"
    assert outcomes["later"] == "matches, but rule 'own' came first"
    assert outcomes["part"] == outcomes["other"] == "does not match"
    shown = {condition.text: (condition.holds, condition.found) for v in found.verdicts for condition in v.conditions}
    assert shown["name: q_proj"] == (False, "only a part of the name matches; names are matched whole")
    assert shown["layers: 1-2"] == (False, "layer 0")
    assert shown["where: out_features >=9999"] == (False, "64")
    assert shown["class: LlamaAttention"] == (False, "Linear")
    rejected = explain(dense(), loaded, TWO, "model.layers.0.self_attn")
    text = next(verdict.outcome for verdict in rejected.verdicts if verdict.rule_id == "norms")
    assert text == "matches, but linear cannot: LlamaAttention is not an nn.Linear (on_unavailable: next)"
    assert rejected.decision == "kept: no rule decides it"


def test_a_module_inside_a_replaced_one_is_explained():
    loaded = rules({"id": "block", "match": {"role": "moe"}, "replace": {"class": "torch"}}, {"match": {"role": "linear"}})
    found = explain(moe(), loaded, TWO, "model.layers.0.mlp.experts")
    assert found.decision == "goes with model.layers.0.mlp, which is replaced as a whole"
    with pytest.raises(ConfigurationError, match=r"did you mean 'model\.layers\.0\.mlp\.experts'"):
        explain(moe(), loaded, TWO, "model.layers.0.mlp.expert")


def messages(loaded, models=None, platforms=None) -> str:
    return "\n".join(f"{each.severity}: {each.message} | {each.hint}" for each in lint(loaded, models or {}, platforms or {}))


def test_lint_sees_patterns_that_take_too_much():
    text = messages(rules({"id": "a", "match": {"name": r"model.layers\.1.*"}}))
    assert r"the dot at character 6 of 'model.layers\\.1.*' matches any character" in text
    assert r"'layers\\.1' also takes 10 to 19" in text
    good = rules({"match": {"name": r"model\.layers\.1\.mlp\.[a-z._]+"}}, {"match": {"name": r"model\.layers\.\d+\..*"}})
    assert messages(good) == ""
    assert "^ and $ are not needed" in messages(rules({"match": {"name": r"^lm_head$"}}))


def test_lint_sees_linear_rules_over_fused_experts():
    loaded = rules({"id": "a", "match": {"class": "torch.nn.Linear"}})
    assert "the experts of this model are fused parameters of 3 modules that no rule takes" in messages(loaded, {"m": moe()})
    assert "fused" not in messages(loaded, {"m": dense()})
    both = rules({"match": {"role": "experts"}, "replace": {"class": "experts"}}, {"match": {"role": "linear"}})
    assert "fused" not in messages(both, {"m": moe()}, {"p": TWO})


def test_lint_sees_layers_that_are_missing():
    model = dense(num_hidden_layers=12)
    assert "but not 10" in messages(rules({"id": "a", "match": {"name": r"model\.layers\.([0-9]|11)\.mlp"}}), {"m": model})
    assert "names layer 12, the model has 0-11" in messages(rules({"match": {"role": "mlp", "layers": "3-14"}}), {"m": model})


def test_lint_plans_and_reports_rejections_and_requirements():
    loaded = rules({"id": "a", "match": {"role": "norm"}}, requires={"numa_nodes": ">=4"})
    found = lint(loaded, {"m": dense()}, {"p": TWO})
    text = "\n".join(each.message for each in found)
    assert worst(found) == "error"
    assert "requires numa_nodes >=4, found 2" in text and "is not an nn.Linear" in text
    assert all(each.subject == "m on p" for each in found if each.severity == "error")


def test_lint_sees_settings_that_hurt_there():
    mirrored = {"class": "linear", "kwargs": {"placement": "mirror"}}
    loaded = rules(
        {"id": "a", "match": {"role": "linear"}, "replace": mirrored},
        runtime={"threads_per_node": 9, "nodes": [0], "pages": "1g", "strict": False},
    )
    text = messages(loaded, {}, {"p": SNC})
    for piece in (
        "9 threads per node, 4 cores",
        "nodes 1, 2, 3 stay idle",
        "pages: 1g, but none are reserved there",
        "strict: false",
        "a mirror makes 4 copies here, one per node and not per socket",
    ):
        assert piece in text
    assert "a mirror on one node is one copy" in messages(loaded, {}, {"p": Platform.virtual(1)})
    assert messages(load_rules("auto", platform=TWO), {"m": dense()}, {"p": TWO}) == ""


def test_the_difference_of_two_plans():
    model = moe()
    first, second = (
        make_plan(model, load_rules("auto", platform=TWO, config=model.config, overrides=given), TWO)
        for given in ([], ["rules.experts.replace.kwargs.format=int4"])
    )
    found = difference(first, second)
    assert next((change.name, change.before, change.after) for change in found.changes) == (
        "model.layers.0.mlp.experts",
        "experts int8 bind",
        "experts int4 bind",
    )
    assert len(found.changes) == 3 and found
    assert not difference(first, first)


def test_a_starting_file_plans_as_it_is(tmp_path):
    for model in (dense(), moe()):
        path = tmp_path / "rules.yaml"
        path.write_text(starting_file(model, TWO, title="it's a model"))
        loaded = load_rules(path, platform=TWO, config=model.config)
        assert make_plan(model, loaded, TWO).modules
        assert ("# What there is" in path.read_text()) and ("experts" in path.read_text()) == (model.config.model_type != "llama")
        # what stands in it as an example works when it is uncommented
        lines = path.read_text().splitlines()
        begin = lines.index("# rules:")
        text = "\n".join([*lines[:begin], *(line.removeprefix("# ").removeprefix("#") for line in lines[begin:])])
        path.write_text(text)
        loaded = load_rules(path, platform=TWO, config=model.config)
        assert "lm_head" not in [rule.id for rule in loaded.rules] and make_plan(model, loaded, TWO).modules


def test_predictions_follow_bytes_and_nodes():
    model = dense(hidden_size=4096, intermediate_size=16384, head_dim=1024)
    plans = {
        format: make_plan(model, load_rules("auto", platform=TWO, overrides=[f"vars.format={format}"]), TWO)
        for format in ("int8", "int4")
    }
    int8, int4 = (predict(plans[format], TWO) for format in ("int8", "int4"))
    assert int4.of_plan.decode_tokens_per_s > 1.5 * int8.of_plan.decode_tokens_per_s
    by_policy = {each.policy: each for each in int8.alternatives}
    assert set(by_policy) == {"shard", "mirror", "interleave", "one node"}
    assert by_policy["shard"].decode_tokens_per_s > by_policy["interleave"].decode_tokens_per_s
    assert by_policy["shard"].decode_tokens_per_s > 1.5 * by_policy["one node"].decode_tokens_per_s
    assert by_policy["mirror"].memory == 2 and int8.of_plan.policy == "shard"
    assert any("unknown" in line for line in int8.assumptions)
    known = replace(TWO, nodes=tuple(replace(node, read_mb_per_s=200_000) for node in TWO.nodes))
    assert any("HMAT" in line for line in predict(plans["int8"], known).assumptions)
    empty = make_plan(model, load_rules([{"match": {"role": "norm"}, "replace": {"class": "default"}}]), TWO)
    assert predict(empty, TWO) is None
