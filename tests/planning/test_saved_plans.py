"""A plan written to a file is carried out as it is, or refused with everything that differs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from numagraft.errors import PlanError
from numagraft.placement import Part
from numagraft.planning import Plan, make_plan
from numagraft.plans import plan_json
from numagraft.plans.verification import fit_to
from numagraft.platform import Platform
from numagraft.rulefile import load_rules
from numagraft.runtime import RuntimeLayout

from .small import dense, moe

TWO = Platform.virtual(2, cores_per_node=4, memory_per_node=8 << 30)
#: big enough that `auto` shards it
WIDE = {"hidden_size": 2048, "intermediate_size": 2048, "head_dim": 512, "moe_intermediate_size": 128}
RULES = {
    "rules": [
        {
            "id": "experts",
            "match": {"role": "experts"},
            "replace": {"class": "experts", "kwargs": {"placement": "shard"}},
        },
        {
            "id": "linear",
            "match": {"role": "linear"},
            "replace": {"class": "linear", "kwargs": {"placement": {"policy": "mirror", "nodes": [0, 1]}}},
        },
        {"id": "norms", "match": {"role": "norm", "layers": 0}, "replace": {"class": "default", "device": "cuda:0"}},
    ]
}


def plan(model: Any, *, platform: Platform = TWO, rules: Any = RULES) -> Plan:
    return make_plan(model, load_rules(rules, platform=platform, config=model.config), platform)


def refused(saved: Plan, model: Any, platform: Platform = TWO, **options: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        fit_to(saved, model, platform, **options)
    return [f"{problem.where}: {problem.message}" for problem in caught.value.problems]


def changed(saved: Plan, module: str, /, **fields: Any) -> Plan:
    """The plan with one module changed, as a careful forger would: the checksum holds."""
    return replace(saved, modules=tuple(replace(m, **fields) if m.name == module else m for m in saved.modules))


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("rules", ["auto", RULES])
def test_a_plan_comes_back_from_its_file_equal_and_holds(make, rules, tmp_path):
    if rules is not RULES or make is moe:
        saved = plan(make(), rules=rules)
        file = tmp_path / "plan.json"
        file.write_text(saved.to_json(indent=1))
        assert Plan.read(file) == saved
        again = fit_to(Plan.read(file), make(), TWO)
        assert replace(again, layout=saved.layout) == saved
        assert json.loads(file.read_text())["made_for"]["numagraft"]


def test_free_memory_is_todays():
    saved = plan(moe())
    later = Platform.virtual(2, cores_per_node=4, memory_per_node=4 << 30)
    assert [node.free_bytes for node in fit_to(saved, moe(), later).layout.nodes] == [4 << 30] * 2
    small = Platform.virtual(2, cores_per_node=4, memory_per_node=1 << 16)
    assert any(text.startswith("memory: node 0 needs") for text in refused(saved, moe(), small))


def test_a_plan_of_another_model_names_all_that_differs():
    saved = plan(moe())
    assert refused(saved, moe(num_hidden_layers=2)) == [
        f"model.layers.2.{name}: is in the plan, but not in the model"
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "mlp.gate.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        )
    ]
    wider = refused(saved, moe(moe_intermediate_size=48))
    assert wider == [
        "model.layers.{0-2}.mlp.experts.gate_up_proj: has the shape [8, 96, 64] in the model; the plan is for [8, 64, 64]",
        "model.layers.{0-2}.mlp.experts.down_proj: has the shape [8, 64, 48] in the model; the plan is for [8, 64, 32]",
    ]
    foreign = refused(saved, dense())
    assert foreign[:2] == [
        "model class: the plan is for Qwen3MoeForCausalLM, the model has LlamaForCausalLM",
        "model_type: the plan is for qwen3_moe, the model has llama",
    ]
    assert "model.layers.{0-2}.mlp.experts.gate_up_proj: is in the plan, but not in the model" in foreign
    assert "model.layers.{0-2}.mlp.up_proj.weight: is in the model, but not in the plan" in foreign


def test_the_dtype_of_what_is_kept_is_part_of_a_plan():
    float32 = moe().float()
    assert refused(plan(moe()), float32) == ["dtype: the plan is for bfloat16, the model has float32"]


def test_a_plan_of_another_machine_names_all_that_differs():
    saved = plan(moe())
    one = Platform.virtual(1, cores_per_node=4, isa=("avx512", "avx2"), memory_per_node=8 << 30)
    assert refused(saved, moe(), one) == [
        "instruction set: the plan is for a CPU with avx2, scalar; this one runs avx512, avx2, scalar",
        "node 1: is not there, or this process may not use it",
    ]
    fewer = Platform.virtual(2, cores_per_node=2, memory_per_node=8 << 30)
    assert refused(saved, moe(), fewer) == [
        "node 0: CPUs 2-3 belong to another node here",
        "node 1: its CPUs 4-7 are not there, or not allowed to this process",
    ]


def test_another_version_of_numagraft_plans_again():
    saved = plan(moe())
    old = replace(saved, made_for=replace(saved.made_for, numagraft="0.0.9"))
    assert refused(old, moe()) == ["numagraft: the plan was made by 0.0.9, this is 0.1.0"]


def test_a_virtual_layout_must_be_given_again():
    layout = RuntimeLayout.virtual(2)
    model = moe()
    saved = make_plan(model, load_rules(RULES, platform=TWO, config=model.config), TWO, layout=layout)
    assert fit_to(saved, model, TWO, layout=layout) == saved
    assert refused(saved, model)[0] == "nodes[0]: is virtual: no machine has it"
    assert refused(saved, model, layout=RuntimeLayout.virtual(4)) == [
        "runtime: the plan was made for another layout than the one given"
    ]


EXPERTS = "model.layers.1.mlp.experts"
Q = "model.layers.0.self_attn.q_proj"


def tampered() -> dict[str, tuple[Any, list[str]]]:
    """How a plan may have been edited, and what is said of it."""
    saved = plan(moe(**WIDE))
    linear, experts = saved.module(Q), saved.module(EXPERTS)
    norm = "model.layers.0.input_layernorm"
    copy = linear.placement.parts[0]
    half = replace(experts.placement.parts[0], end=experts.placement.parts[0].end - 32)
    far = Part((7,), False, (7,), 0, copy.end)
    node_bytes = {0: 1, 1: 1}
    again = (*saved.modules, linear)
    inside = replace(linear, name="model.layers.1.mlp.experts.act_fn", class_name="SiLUActivation")
    return {
        "a module twice": (replace(saved, modules=again), [f"{Q}: is in the plan twice"]),
        "a module that is not there": (
            changed(saved, Q, name="model.layers.0.self_attn.x_proj"),
            ["model.layers.0.self_attn.x_proj: is in the plan, but not in the model", f"{Q}: keeps 8,388,608 bytes"],
        ),
        "below a replaced one": (
            replace(saved, modules=(*saved.modules, inside)),
            [f"{inside.name}: lies in {EXPERTS}, which the plan replaces as a whole"],
        ),
        "another class": (changed(saved, Q, class_name="Conv1D"), [f"{Q}: is a Linear; the plan is for a Conv1D"]),
        "an operator that does not fit": (
            changed(saved, Q, operator="experts"),
            [f"{Q}: experts cannot replace it: Linear holds no experts"],
        ),
        "another device": (changed(saved, Q, device="cuda:0"), [f"{Q}: linear cannot replace it: it runs on cpu only"]),
        "no device": (changed(saved, norm, device="gpu0"), [f"{norm}: 'gpu0' is not a torch device"]),
        "nodes that are not there": (
            changed(saved, Q, placement=replace(linear.placement, parts=(far,))),
            [f"{Q}: its placement names nodes 7, which the plan does not have"],
        ),
        "units left out": (
            changed(saved, EXPERTS, placement=replace(experts.placement, parts=(half, *experts.placement.parts[1:]))),
            [f"{EXPERTS}: its placement holds units [(0, "],
        ),
        "units held twice": (
            changed(saved, EXPERTS, placement=replace(experts.placement, parts=(*experts.placement.parts, half))),
            [f"{EXPERTS}: its placement holds units"],
        ),
        "no parts": (
            changed(saved, Q, placement=replace(linear.placement, parts=())),
            [f"{Q}: its placement has no parts"],
        ),
        "no placement": (changed(saved, Q, placement=None), [f"{Q}: linear needs a placement"]),
        "a part on no node": (
            changed(saved, Q, placement=replace(linear.placement, parts=(replace(copy, memory_nodes=()),))),
            [f"{Q}: its placement has a part on no node"],
        ),
        "auto": (
            changed(saved, Q, placement=replace(linear.placement, policy="auto")),
            [f"{Q}: its placement is auto: a plan says which policy that means"],
        ),
        "other bytes": (
            changed(saved, Q, node_bytes=node_bytes),
            [f"{Q}: takes {{0: ", "node_bytes: is"],
        ),
        "other bytes per token": (changed(saved, Q, bytes_per_token=1), [f"{Q}: takes", "bytes_per_token: is"]),
        "another format": (changed(saved, Q, params=replace(linear.params, format="bf16")), [f"{Q}: takes"]),
        "other totals": (replace(saved, kept_bytes=1), ["kept_bytes: is 1 in the plan, but its modules add up to"]),
        "kept bytes": (
            replace(saved, kept=(replace(saved.kept[0], bytes=3), *saved.kept[1:])),
            ["model.embed_tokens: is a Embedding that keeps", "kept_bytes: is"],
        ),
        "kept modules left out": (
            replace(saved, kept=saved.kept[1:]),
            ["model.embed_tokens: keeps", "kept_bytes: is"],
        ),
        "threads that are not there": (
            replace(
                saved, layout=replace(saved.layout, nodes=tuple(replace(n, threads=99) for n in saved.layout.nodes))
            ),
            ["node 0: has 99 threads for 4 CPUs", "node 1: has 99 threads for 4 CPUs"],
        ),
        "no nodes": (
            replace(saved, layout=replace(saved.layout, nodes=())),
            ["nodes: the plan has none", "nodes: none of the plan's nodes has threads"],
        ),
    }


@pytest.mark.parametrize("how", [
    "a module twice", "a module that is not there", "below a replaced one", "another class",
    "an operator that does not fit", "another device", "no device", "nodes that are not there", "units left out",
    "units held twice", "no parts", "no placement", "a part on no node", "auto", "other bytes", "other bytes per token",
    "another format", "other totals", "kept bytes", "kept modules left out", "threads that are not there", "no nodes",
])  # fmt: skip
def test_edited_plans(how):
    """Even with a checksum that holds, a plan is held against what the operators say of the model."""
    saved, expected = tampered()[how]
    found = refused(Plan.from_json(saved.to_json()), moe(**WIDE))
    missing = [text for text in expected if not any(line.startswith(text) for line in found)]
    assert not missing, "\n".join(found)
    assert len(found) <= len(expected) + 3, "\n".join(found)


def test_every_kind_of_edit_is_tried():
    assert sorted(tampered()) == sorted(test_edited_plans.pytestmark[0].args[1])


def test_an_edited_file_is_told_from_a_written_one():
    text = plan(moe()).to_json()
    for before, after in (
        ('"threads": 4', '"threads": 3'),
        ('"strict": true', '"strict": false'),
        ("as asked", "as ever"),
    ):
        assert before in text
        with pytest.raises(PlanError, match="the file was changed after it was written"):
            Plan.from_json(text.replace(before, after))


BAD_FILES = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "expected 2, found 'list'"),
    ('{"schema": 2}', "layout: is missing"),
    ('{"schema": 2, "modules": 3}', "modules: expected a list, found int '3'"),
    ('{"schema": 2, "modules": [3]}', r"modules\[0\]: expected an object, found int '3'"),
    ('{"schema": 2, "colour": "red"}', "colour: is not a known field"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_what_is_no_plan(text, message, tmp_path):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(PlanError, match="there is no such file"):
        Plan.read(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"schema": "\xe9"}')
    with pytest.raises(PlanError, match="it cannot be read"):
        Plan.read(tmp_path / "latin.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(plan_json.MAX_BYTES + 1)
    with pytest.raises(PlanError, match="at most 64"):
        Plan.read(tmp_path / "huge.json")


def test_a_plan_imports_no_code_of_a_stranger():
    saved = changed(plan(moe()), Q, operator="antigravity.Anything")
    with pytest.raises(PlanError, match="code outside the registry"):
        Plan.from_json(saved.to_json())
    import sys

    assert "antigravity" not in sys.modules
