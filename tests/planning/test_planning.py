"""Plans: what is replaced, what it costs, what does not fit, and errors that name everything at once."""

from __future__ import annotations

import pytest

from numagraft.errors import PlanError, RuleError
from numagraft.planning import Plan, make_plan
from numagraft.platform import Platform
from numagraft.rulefile import load_rules

from .small import dense, moe

TWO_NODES = Platform.virtual(2, cores_per_node=4, memory_per_node=8 << 30)
#: large enough that `auto` would shard it, small enough that a node holds one copy and not two
BIG = {"hidden_size": 8192, "intermediate_size": 8192, "num_hidden_layers": 8, "head_dim": 2048}


def plan(model, rules="auto", *, platform=TWO_NODES, overrides=(), **options) -> Plan:
    loaded = load_rules(rules, platform=platform, config=model.config, overrides=overrides)
    return make_plan(model, loaded, platform, **options)


def test_the_generic_preset_grafts_everything_it_names():
    made = plan(moe())
    by_rule = {}
    for module in made.modules:
        by_rule.setdefault(module.rule_id, []).append(module.name)
    assert len(by_rule["experts"]) == 3
    assert by_rule["lm_head"] == ["lm_head"]
    assert len(by_rule["linear"]) == 12
    kept = {module.name: module for module in made.kept}
    assert kept["model.layers.0.mlp.gate"].role == "router"
    assert kept["model.embed_tokens"].why == "no rule matches"


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_formats_are_set_by_a_variable(format):
    for model in (dense(), moe()):
        made = plan(model, overrides=[f"vars.format={format}", "vars.lm_head_format=int8"])
        assert {module.format for module in made.modules if module.rule_id != "lm_head"} == {format}
        assert made.module("lm_head").format == "int8"


def test_a_tied_head_is_a_packed_copy_beside_the_kept_embedding():
    tied, untied = plan(dense(tie_word_embeddings=True)), plan(dense(tie_word_embeddings=False))
    assert tied.module("lm_head").node_bytes == untied.module("lm_head").node_bytes
    assert tied.kept_bytes == untied.kept_bytes
    assert "model.embed_tokens" in [module.name for module in tied.kept]
    without = load_rules("auto", platform=TWO_NODES, overrides=["rules.lm_head.match.name=nothing"])
    kept = make_plan(dense(tie_word_embeddings=True), without, TWO_NODES)
    assert kept.kept_bytes == tied.kept_bytes, "a tied weight that stays counts once"
    apart = make_plan(dense(tie_word_embeddings=False), without, TWO_NODES)
    assert apart.kept_bytes > kept.kept_bytes


def test_totals_are_the_sum_of_the_modules():
    made = plan(moe(**BIG, num_experts=4))
    for node in (0, 1):
        assert made.node_bytes[node] == sum(module.node_bytes.get(node, 0) for module in made.modules)
    assert made.bytes_per_token == sum(module.bytes_per_token for module in made.modules)


def test_mirrors_that_do_not_fit_name_the_nearest_fix():
    with pytest.raises(PlanError) as caught:
        plan(dense(**BIG), overrides=["vars.placement=mirror"], platform=Platform.virtual(2, memory_per_node=2 << 30))
    text = str(caught.value)
    assert "does not fit in memory" in text and "family/llama.yaml:" in text
    assert "nearest change that fits: --set vars.placement=shard" in text
    with pytest.raises(PlanError, match=r"--set vars.format=int4 .* --set vars.placement=shard"):
        plan(dense(**BIG), overrides=["vars.placement=mirror"], platform=Platform.virtual(2, memory_per_node=900 << 20))
    with pytest.raises(PlanError, match="free memory, or use a machine with more"):
        plan(dense(**BIG), overrides=["vars.placement=mirror"], platform=Platform.virtual(2, memory_per_node=100 << 20))
    plan(dense(**BIG), overrides=["vars.placement=mirror"])


def test_a_fix_that_is_named_does_fit():
    small = Platform.virtual(2, memory_per_node=900 << 20)
    plan(dense(**BIG), overrides=["vars.format=int4", "vars.placement=shard"], platform=small)


def test_wrong_kwargs_are_all_named_with_their_place():
    kwargs = {"fromat": "int8", "group": 33, "scale": "1", "symmetric": "yes", "placement": {"polcy": "mirror"}}
    with pytest.raises(RuleError) as caught:
        plan(dense(), [{"id": "x", "match": {"role": "linear"}, "replace": {"class": "linear", "kwargs": kwargs}}])
    found = [f"{problem.message} | {problem.hint}" for problem in caught.value.problems]
    assert found == [
        "linear takes no kwarg 'fromat' | did you mean 'format'?",
        "linear: group is the number 33, expected one of 32, 64, 128 | ",
        "linear: scale is the text '1', expected a number | ",
        "linear: symmetric is the text 'yes', expected true or false | "
        "true and false are the only booleans: yes, no, on and off are text",
        "linear: placement.polcy: unknown key | did you mean policy?",
    ]
    assert caught.value.problems[0].where == "rules: rules[0].replace.kwargs.fromat"


def test_a_node_that_does_not_exist_is_an_error():
    rule = {"match": {"role": "linear"}, "replace": {"class": "linear", "kwargs": {"placement": {"nodes": [0, 7]}}}}
    with pytest.raises(PlanError, match="7"):
        plan(dense(), [rule])


def test_rejections_stop_or_fall_back():
    rule = {"id": "x", "match": {"role": "norm"}, "replace": {"class": "linear"}}
    with pytest.raises(PlanError, match=r"linear cannot replace model\.layers\.0\.input_layernorm, .*is not an nn.Linear"):
        plan(dense(), [rule])
    kept = plan(dense(), [{**rule, "on_unavailable": "keep"}])
    assert kept.modules == () and len(kept.fallbacks) == 1
    why = next(module.why for module in kept.kept if module.name == "model.norm")
    assert why == "rule 'x': LlamaRMSNorm is not an nn.Linear"
    later = {"id": "y", "match": {"role": "norm"}, "replace": {"class": "torch"}}
    moved = plan(dense(), [{**rule, "on_unavailable": "next"}, later])
    assert {module.rule_id for module in moved.modules} == {"y"}
    assert "left to later rules" in moved.fallbacks[0]


def test_unmet_requirements_are_named():
    text = {"requires": {"numa_nodes": ">=4", "model_type": "qwen3_moe", "isa": ["amx"]}, "extends": ["auto"]}
    with pytest.raises(PlanError) as caught:
        plan(dense(), text)
    assert [problem.message for problem in caught.value.problems] == [
        "requires numa_nodes >=4, found 2",
        "requires model_type qwen3_moe, found llama",
        "requires the instruction set amx; this CPU runs avx2, scalar",
    ]


def test_a_kept_and_moved_module_takes_its_bytes_along():
    rules = [
        {"id": "move", "match": {"role": "decoder_layer", "layers": 0}, "replace": {"class": "default", "device": "cuda:0"}},
        {"id": "back", "match": {"name": r"model\.layers\.0\.mlp\..*_proj"}, "replace": {"class": "linear"}},
    ]
    made = plan(dense(), rules)
    moved = made.module("model.layers.0")
    attention = 64 * 64 * 2 + 2 * (64 * 32)
    assert moved.device_bytes == {"cuda:0": 2 * (attention + 2 * 64)}
    assert made.device_bytes == moved.device_bytes
    assert made.module("model.layers.0.mlp.up_proj").device == "cpu"


def test_native_operators_stay_on_the_cpu():
    rule = {"match": {"role": "linear"}, "replace": {"class": "linear", "device": "cuda:0"}}
    with pytest.raises(RuleError, match="linear on cuda:0: it runs on cpu only"):
        plan(dense(), [rule])


def test_a_plan_survives_json_and_is_printable():
    made = plan(moe())
    assert Plan.from_json(made.to_json()) == made
    text = str(made)
    for piece in ("read per token\n", "model.layers.{0-2}.mlp.experts", "generic.yaml:", "int8", "node 1", "kept torch tensors"):
        assert piece in text
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json("{")
    with pytest.raises(PlanError, match="expected 2, found 7"):
        Plan.from_json('{"schema": 7}')
    with pytest.raises(PlanError, match="expected one of auto, bf16, int8, int4"):
        Plan.from_json(made.to_json().replace('"format": "int8", "group"', '"format": "int9", "group"'))
