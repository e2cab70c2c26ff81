"""The main job with real operators: rules in, a verified and ordinary model out."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from numagraft import GraftConfig, RuntimeLayout, load_and_optimize, optimize, plan
from numagraft.errors import (
    ConfigurationError,
    NumagraftError,
    PlacementError,
    PlanError,
    RuleError,
    UnsupportedOperationError,
    WeightError,
)
from numagraft.injection import Grafts
from numagraft.operators.experts import Experts
from numagraft.operators.linear import Linear
from tests import models
from tests.grafting import TOKENS, logits, skeleton_for

#: relative error of logits against the original, for weights of random models (int4 has no structure to use there)
TOLERANCE = {"bf16": 1e-2, "int8": 5e-2, "int4": 5e-1}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(family: str) -> Any:
    return models.build(models.CONFIGS[family]())


@pytest.fixture(scope="module")
def saved(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(original, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("format_", TOLERANCE)
@pytest.mark.parametrize("nodes", [None, 2, 4])
def test_a_directory(saved: Path, original: Any, format_: str, nodes: int | None) -> None:
    layout = None if nodes is None else RuntimeLayout.virtual(nodes)
    model = load_and_optimize(saved, "auto", overrides=[f"vars.format={format_}"], runtime=layout)
    assert relative(logits(model), logits(original)) < TOLERANCE[format_]
    assert model.num_parameters() == original.num_parameters()
    assert model.placement_report().ok
    assert isinstance(model.lm_head, Linear)
    if hasattr(original.config, "num_experts"):
        assert isinstance(model.model.layers[0].mlp.experts, Experts)


def test_all_doors_give_the_same_model(saved: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    by_path = load_and_optimize(saved, overrides=["vars.format=int8"])
    by_memory = optimize(models.build(models.CONFIGS[family]()), overrides=["vars.format=int8"])
    by_config = AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=GraftConfig(overrides=["vars.format=int8"])
    )
    assert torch.equal(logits(by_path), logits(by_memory))
    assert torch.equal(logits(by_path), logits(by_config))


@pytest.mark.parametrize("nodes", [None, 2])
def test_a_saved_plan_gives_the_same_model_as_its_rules(saved: Path, family: str, nodes: int | None, tmp_path) -> None:
    layout = None if nodes is None else RuntimeLayout.virtual(nodes)
    rules = {"extends": ["auto"], "vars": {"format": "int4", "placement": "shard"}}
    by_rules = load_and_optimize(saved, rules, runtime=layout)
    file = tmp_path / "plan.json"
    file.write_text(plan(saved, rules, runtime=layout).to_json())
    by_plan = load_and_optimize(saved, plan=file, runtime=layout)
    assert by_plan.numagraft_plan.modules == by_rules.numagraft_plan.modules
    assert torch.equal(logits(by_plan), logits(by_rules))
    assert by_plan.placement_report().ok
    in_memory = optimize(models.build(models.CONFIGS[family]()), plan=by_rules.numagraft_plan, runtime=layout)
    assert torch.equal(logits(in_memory), logits(by_rules))


def test_a_plan_of_another_model_is_refused_before_anything_is_read(saved: Path, family: str) -> None:
    other = next(name for name in ("llama", "qwen3_moe") if name != family)
    foreign = plan(models.build(models.CONFIGS[other]()))
    with pytest.raises(PlanError, match="does not hold here") as caught:
        load_and_optimize(saved, plan=foreign)
    assert {problem.where for problem in caught.value.problems} >= {"model class", "model_type"}
    with pytest.raises(ConfigurationError, match="give a plan, or rules and overrides, not both"):
        load_and_optimize(saved, plan=foreign, overrides=["vars.format=int8"])
    with pytest.raises(ConfigurationError, match="is no plan"):
        load_and_optimize(saved, plan=3)


def test_the_report_holds_what_was_placed_against_the_plan(saved: Path) -> None:
    """A module that takes other bytes than its plan said is not as asked, though every page is on the right node."""
    from numagraft.loading import make_reporter

    model = load_and_optimize(saved, overrides=["vars.placement=shard"], runtime=RuntimeLayout.virtual(2))
    made = model.numagraft_plan
    operators = {each.name: model.get_submodule(each.name) for each in made.modules}
    planned = {each.name: each for each in made.modules}
    first = made.modules[0]
    planned[first.name] = replace(first, node_bytes={node: amount + 8192 for node, amount in first.node_bytes.items()})
    runtime = next(iter(operators.values()))._runtime
    for expected, grafts in ((True, {each.name: each for each in made.modules}), (False, planned)):
        report = make_reporter(made, Grafts(operators, grafts, {}), runtime, None)()
        assert report.ok is expected
    assert [problem.where for problem in report.incomplete] == [first.name] * len(first.node_bytes)
    assert "the plan said" in report.incomplete[0].message


@pytest.mark.parametrize("name", models.FAMILIES)
def test_families_with_other_names_and_shapes(name: str, tmp_path: Path) -> None:
    """Both doors, in bf16, where every weight is itself and only the inner products round."""
    from transformers import AutoModelForCausalLM

    original = models.build(models.FAMILIES[name](), dtype=torch.bfloat16)
    for buffer_name, buffer in original.named_buffers():
        if "correction" in buffer_name:
            buffer.copy_(torch.rand_like(buffer))
    path = models.save(original, tmp_path)
    model = load_and_optimize(path, overrides=["vars.format=bf16"])
    assert relative(logits(model), logits(original)) < 3e-2
    assert model.num_parameters() == original.num_parameters()
    other = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=GraftConfig(overrides=["vars.format=bf16"])
    )
    assert torch.equal(logits(other), logits(model))
    assert {n: p.dtype for n, p in other.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize("door", ["load_and_optimize", "from_pretrained"])
def test_what_a_family_keeps_in_float32_stays_so(door: str, tmp_path: Path) -> None:
    """DeepSeek's correction bias decides which experts run; rounded to bfloat16, others would."""
    from transformers import AutoModelForCausalLM

    path = models.save(models.build(models.deepseek_v3(), dtype=torch.float32), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    rules = {
        "schema": 1,
        "rules": [{"id": "mixture", "match": {"name": r"model\.layers\.1\.mlp"}, "replace": {"class": "torch"}}],
    }
    if door == "load_and_optimize":
        model = load_and_optimize(path, rules, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=GraftConfig(rules=rules)
        )
    assert plain.model.layers[1].mlp.gate.e_score_correction_bias.dtype is torch.float32
    for name, tensor in plain.model.layers[1].mlp.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        found = getattr(model.model.layers[1].mlp.get_submodule(owner), leaf)
        assert found.dtype is tensor.dtype and torch.equal(found, tensor), name
    assert torch.equal(logits(model), logits(plain))


def test_plan_reads_no_weight_and_says_what_load_does(
    saved: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Any] = []
    model = load_and_optimize(saved, on_plan=planned.append)
    monkeypatch.setattr(
        "numagraft.checkpoints.files.UncachedFile.read_tensor", lambda *_: pytest.fail("a weight was read")
    )
    assert plan(saved).modules == planned[0].modules == model.numagraft_plan.modules == plan(original).modules


def test_rules_are_refused_before_anything_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "numagraft.checkpoints.files.UncachedFile.read_tensor", lambda *_: pytest.fail("a weight was read")
    )

    def rule(**replace: Any) -> dict[str, Any]:
        return {"schema": 1, "rules": [{"id": "all", "match": {"role": "linear"}, "replace": replace}]}

    for wrong in (
        {"class": "linnear"},
        {"class": "linear", "kwargs": {"format": "int3"}},
        {"class": "linear", "kwargs": {"placement": {"policy": "bind", "nodes": [977]}}},
    ):
        with pytest.raises((RuleError, PlanError)):
            load_and_optimize(saved, rule(**wrong))
    with pytest.raises(RuleError):
        load_and_optimize(
            saved, {"schema": 1, "rules": [{"id": "x", "match": {"role": "nothing"}, "replace": {"class": "linear"}}]}
        )


def test_a_model_that_does_not_fit_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    layout = RuntimeLayout.virtual(2)
    layout = replace(layout, nodes=tuple(replace(node, free_bytes=1000, total_bytes=1000) for node in layout.nodes))
    rules = {
        "schema": 1,
        "rules": [
            {
                "id": "all",
                "match": {"role": "linear"},
                "replace": {"class": "linear", "kwargs": {"placement": "mirror"}},
            }
        ],
    }
    monkeypatch.setattr(
        "numagraft.checkpoints.files.UncachedFile.read_tensor", lambda *_: pytest.fail("a weight was read")
    )
    with pytest.raises(PlanError, match="fit"):
        load_and_optimize(saved, rules, runtime=layout)


def lie(*_: Any, **__: Any) -> None:
    raise PlacementError("planted")


def test_a_planted_misplacement_is_refused_before_the_model_is_returned(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's answer is bent: every page on a node that nobody asked for."""
    from dataclasses import replace

    from numagraft import native

    real = native.Runtime.survey

    def elsewhere(runtime: Any, buffers: Any) -> Any:
        counts, arenas = real(runtime, buffers)
        return [replace(count, per_node={77: sum(count.per_node.values())}, absent=0) for count in counts], arenas

    assert load_and_optimize(saved).placement_report().ok
    monkeypatch.setattr(native.Runtime, "survey", elsewhere)
    with pytest.raises(PlacementError, match="node 77"):
        load_and_optimize(saved)
    tolerant = load_and_optimize(saved, overrides=["runtime.strict=false"])
    assert not tolerant.placement_report().ok
    monkeypatch.setattr(native.Runtime, "survey", real)
    assert tolerant.placement_report().ok  # asked again, the truth


@pytest.mark.parametrize("operator", [Linear, Experts])
@pytest.mark.parametrize("from_file", [True, False])
def test_a_weight_that_never_arrives(
    saved: Path, family: str, operator: type, from_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if operator is Experts and family != "qwen3_moe":
        pytest.skip("no experts in this family")
    original = operator.load
    victim = "model.layers.1.mlp.experts" if operator is Experts else "model.layers.1.self_attn.o_proj"

    def lose(self: Any, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        if not (self.name == victim and expert in (None, 2)):
            original(self, name, tensor, expert=expert)

    def lose_stored(self: Any, name: str, matrices: Any, **which: Any) -> bool:
        return from_file and (self.name == victim or stored(self, name, matrices, **which))

    stored = operator.load_stored
    monkeypatch.setattr(operator, "load", lose)
    monkeypatch.setattr(operator, "load_stored", lose_stored)
    with pytest.raises(WeightError, match="never came") as caught:
        load_and_optimize(saved)
    assert all(problem.where.startswith(victim) for problem in caught.value.problems)


def test_no_memory_stays_after_a_failure(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas of a load that failed are given back: the kernel shows none of them."""
    from numagraft import native

    alive: list[Any] = []
    original = native.Runtime.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        import weakref

        original(self, *args, **kwargs)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(native.Runtime, "__init__", remember)
    monkeypatch.setattr(Linear, "finish", lie)
    with pytest.raises(NumagraftError, match="planted"):
        load_and_optimize(saved)
    gc.collect()
    assert alive and all(reference() is None for reference in alive)


def test_inputs_that_need_gradients_are_refused(saved: Path) -> None:
    model = load_and_optimize(saved)
    embeddings = model.get_input_embeddings()(TOKENS)
    model(inputs_embeds=embeddings)
    with pytest.raises(UnsupportedOperationError):
        model(inputs_embeds=embeddings.requires_grad_())


def test_generation_is_ordinary(saved: Path, original: Any) -> None:
    model = load_and_optimize(saved, overrides=["vars.format=bf16"])
    prompts = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 8, 4, 3]])
    mask = (prompts != 0).long()
    common = {"input_ids": prompts, "attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    tokens = model.generate(**common)
    assert tokens.shape == (2, 10)
    assert torch.equal(model.generate(**common, use_cache=False), tokens)
    # left padding changes nothing for the row that has it
    alone = model.generate(prompts[:1, 2:], max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert torch.equal(alone[0, 3:], tokens[0, 5:])
    torch.manual_seed(0)
    sampled = model.generate(**(common | {"do_sample": True, "top_p": 0.9}))
    assert sampled.shape == (2, 10)


def test_compiled_forward_is_the_same(saved: Path) -> None:
    model = load_and_optimize(saved)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS).logits, logits(model))


def test_dtype_is_that_of_what_is_kept(saved: Path) -> None:
    model = load_and_optimize(saved, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16 and model.model.norm.weight.dtype is torch.bfloat16
    assert logits(model).dtype is torch.bfloat16
    assert torch.isfinite(logits(model)).all()


def test_skeletons_of_tests_and_package_agree(saved: Path, original: Any) -> None:
    assert type(skeleton_for(original.config)) is type(original)


def test_smollm2_answers(smollm2_gguf: Path) -> None:
    """The whole street on the real model: its own 4-bit file, packed as int8, answers as it should."""
    from transformers import pipeline

    from numagraft.checkpoints import load_tokenizer

    seen: list[tuple[int, int, str]] = []
    model = load_and_optimize(smollm2_gguf, overrides=["vars.format=int8"], progress=lambda *call: seen.append(call))
    assert seen[-1][0] == seen[-1][1] > 90_000_000
    assert model.num_parameters() == 134_515_008
    assert model.device.type == "cpu" and model.dtype is torch.float32
    assert model.placement_report().ok
    chat = pipeline("text-generation", model=model, tokenizer=load_tokenizer(smollm2_gguf), device="cpu")
    answer = chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=12, do_sample=False)
    assert "Paris" in answer[0]["generated_text"][-1]["content"]


def test_each_original_weight_is_freed_as_it_is_packed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    model = models.build(models.CONFIGS[family]())
    weights = {
        name: weakref.ref(parameter)
        for name, parameter in model.named_parameters()
        if name.endswith("proj.weight") or ".experts." in name
    }
    alive: list[int] = []
    original = Linear.finish

    def count(self: Any) -> None:
        alive.append(sum(reference() is not None for reference in weights.values()))
        original(self)

    monkeypatch.setattr(Linear, "finish", count)
    optimize(model)
    assert len(weights) > 8
    assert all(reference() is None for reference in weights.values())
    # by the time the last layer is packed, at most its own weights are still there
    assert alive == sorted(alive, reverse=True) and alive[-1] <= 1 < alive[0]


def test_arguments_for_the_model_reach_it(saved: Path) -> None:
    model = load_and_optimize(saved, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_experts_from_a_gguf_file(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    from numagraft.checkpoints import open_checkpoint
    from tests.checkpoints.test_gguf import config_for, write

    path = write(tmp_path / "moe.gguf", "qwen3moe", config_for("qwen3moe"), kind=GGMLQuantizationType.Q8_0)
    with open_checkpoint(path) as source:
        original = models.build(source.config)
        source.bind(original)
        original.load_state_dict({name: tensor.read() for name, tensor in source.items()})
    model = load_and_optimize(path, overrides=["vars.format=bf16"])
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    assert relative(logits(model), logits(original)) < 5e-2
