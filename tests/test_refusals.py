"""What a load refuses: one clear error, at once, before weights are read where names and shapes tell it; nothing stays."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from numagraft import load_and_optimize
from numagraft.checkpoints import LazyTensor
from numagraft.checkpoints.safetensors import SafetensorsTensor
from numagraft.errors import CheckpointError, NumagraftError, UnsupportedOperationError, WeightError
from numagraft.quantizer import GraftConfig
from tests import models, plain_operators
from tests.grafting import graft_plain, load_plain, logits, skeleton_for
from tests.plain_operators import PlainExperts, PlainLinear, plan_plain

FAMILIES = ["llama", "qwen3_moe"]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_and_optimize` and `from_pretrained` with plain operators in place of planned ones."""
    for module in ("api", "quantizer"):
        monkeypatch.setattr(
            importlib.import_module(f"numagraft.{module}"), "plan_model", lambda model, *_, **__: plan_plain(model)
        )
    monkeypatch.setattr(
        importlib.import_module("numagraft.api"),
        "_build_skeleton",
        lambda source, dtype, *_: skeleton_for(source.config, dtype),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(family: str = "qwen3_moe", **changes: Any) -> Path:
        return models.save(models.build(models.CONFIGS[family](**changes)), tmp_path / "model")

    return save


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

SPOILED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a kept parameter is missing": (lambda t: t.pop(NORM), f"{NORM}: is not in the checkpoint"),
    "a grafted parameter is missing": (lambda t: t.pop(QUERY), f"{QUERY}: is not in the checkpoint"),
    "an expert is missing": (lambda t: t.pop(EXPERT), r"lacks experts \[2\]"),
    "the last expert is missing": (
        lambda t: [t.pop(f"model.layers.1.mlp.experts.3.{n}_proj.weight") for n in ("up", "gate", "down")],
        r"lacks experts \[3\]",
    ),
    "an expert too many": (
        lambda t: t.update({EXPERT.replace(".2.", ".9."): t[EXPERT].clone()}),
        r"has experts \[9\]",
    ),
    "a kept parameter of another shape": (lambda t: t.update({NORM: torch.ones(5)}), r"\[5\].*needs \[64\]"),
    "a grafted parameter of another shape": (lambda t: t.update({QUERY: torch.ones(3, 64)}), r"\[3, 64\]"),
    "an expert of another shape": (lambda t: t.update({EXPERT: torch.ones(7, 64)}), r"\[7, 64\]"),
    "a tensor without a place": (lambda t: t.update({"model.extra.weight": torch.ones(1)}), "allow_unexpected"),
    "a tensor of codes": (lambda t: t.update({QUERY: torch.ones(64, 64, dtype=torch.int8)}), "quantised"),
    "a tensor in fp8": (lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}), "quantised"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_names_and_shapes_are_checked_before_anything_is_read(
    saved: Callable[..., Path], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved()
    load_and_optimize(path)  # whole before
    change, message = SPOILED[what]
    rewrite(path, change)
    monkeypatch.setattr(SafetensorsTensor, "read", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(SafetensorsTensor, "read_part", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_and_optimize(path)
    assert str(path) in str(caught.value)


def test_unexpected_tensors_can_be_allowed_by_name(saved: Callable[..., Path]) -> None:
    path = saved()
    rewrite(path, lambda t: t.update({"model.extra.weight": torch.ones(1)}))
    load_and_optimize(path, allow_unexpected=[r"model\.extra\."])
    with pytest.raises(CheckpointError):
        load_and_optimize(path, allow_unexpected=[r"^extra"])


def test_every_offender_is_told_at_once(saved: Callable[..., Path]) -> None:
    path = saved()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(NORM)
        tensors[QUERY] = torch.ones(3, 64)
        tensors["odd"] = torch.ones(1)

    rewrite(path, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_and_optimize(path)
    assert {problem.where for problem in caught.value.problems} == {NORM, QUERY, "odd"}


def test_a_checkpoint_of_another_model(saved: Callable[..., Path]) -> None:
    path = saved("llama")
    config = models.llama(hidden_size=128, num_hidden_layers=3).to_dict()
    (path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(CheckpointError, match="different models or revisions") as caught:
        load_and_optimize(path)
    assert len(str(caught.value)) < 3000


def live_bytes() -> int:
    gc.collect()
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in everything_alive()}
    return sum(tensors.values())


def everything_alive() -> list[torch.Tensor]:
    """Real tensors; other tests leave fake ones (torch.compile), which have no storage to count."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [each for each in gc.get_objects() if type(each) in kinds and each.is_cpu]


def broken_read(at: str, error: Callable[[], Exception]) -> Callable[..., torch.Tensor]:
    original = SafetensorsTensor.read

    def read(self: LazyTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self.name == at:
            raise error()  # a new one each time: a kept exception keeps its frames, and with them the weights
        return original(self, out)

    return read


@pytest.mark.parametrize("at", [NORM, QUERY, EXPERT])
@pytest.mark.parametrize("error", [lambda: CheckpointError("the disk is gone"), lambda: OSError("odd")])
def test_loading_stops_at_the_first_failure_and_leaves_nothing(
    saved: Callable[..., Path], at: str, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(vocab_size=20_000)
    before = live_bytes()
    names: list[str] = []
    monkeypatch.setattr(SafetensorsTensor, "read", broken_read(at, error))
    with pytest.raises(NumagraftError, match=r"the disk is gone|odd") as caught:
        load_and_optimize(path, progress=lambda done, total, name: names.append(name))
    assert isinstance(caught.value, CheckpointError if isinstance(error(), CheckpointError) else WeightError)
    assert "model.norm.weight" not in names  # the last one by name
    assert live_bytes() - before < 100_000  # the embedding alone is 5 MB
    assert caught.value.__traceback__ is not None and caught.value.__context__ is None


@pytest.mark.parametrize("operator, name", [(PlainLinear, "weight"), (PlainExperts, "down_proj")])
@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_that_never_arrives(
    saved: Callable[..., Path], operator: type, name: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = operator.load

    def lose(self: Any, local: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        lost = self.full_name in ("lm_head", "model.layers.1.mlp.experts") and local == name and expert in (None, 3)
        if not lost:
            original(self, local, tensor, expert=expert)

    monkeypatch.setattr(operator, "load", lose)
    with pytest.raises(WeightError, match="never came") as caught:
        load_and_optimize(saved(tie_word_embeddings=tied))
    expected = "lm_head.weight" if operator is PlainLinear else "model.layers.1.mlp.experts.down_proj"
    assert [problem.where for problem in caught.value.problems] == [expected]


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_a_tensor_left_without_memory(saved: Callable[..., Path], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PlainLinear.finish

    def forget(self: PlainLinear) -> None:
        original(self)
        if self.full_name.endswith("layers.1.self_attn.k_proj"):
            empty = torch.empty(3, device="meta")
            if where == "parameter":
                self.register_parameter("forgotten", torch.nn.Parameter(empty))
            else:
                self.register_buffer("forgotten", empty)

    monkeypatch.setattr(PlainLinear, "finish", forget)
    with pytest.raises(WeightError, match="meta device") as caught:
        load_and_optimize(saved())
    assert [problem.where for problem in caught.value.problems] == ["model.layers.1.self_attn.k_proj.forgotten"]


def test_an_operator_that_keeps_no_placeholder(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original = PlainLinear.from_module.__func__

    def forgetful(cls: type, module: torch.nn.Module, params: Any, **more: Any) -> Any:
        operator = original(cls, module, params, **more)
        operator._parameters.clear()
        return operator

    monkeypatch.setattr(PlainLinear, "from_module", classmethod(forgetful))
    with pytest.raises(NumagraftError, match="no matching placeholder for weight"):
        load_and_optimize(saved("llama"))


def test_a_failure_in_memory_leaves_a_model_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(models.qwen3_moe())
    logits(model)
    original = PlainExperts.load

    def fail(self: PlainExperts, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        if self.full_name == "model.layers.1.mlp.experts":
            raise WeightError("planted")
        original(self, name, tensor, expert=expert)

    monkeypatch.setattr(plain_operators.PlainExperts, "load", fail)
    with pytest.raises(WeightError, match="planted"):
        graft_plain(model)
    with pytest.raises(UnsupportedOperationError, match="half way"):
        logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_by_itself(saved: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    original = models.build(models.CONFIGS[family]())
    path = saved(family)
    grafted = AutoModelForCausalLM.from_pretrained(path, quantization_config=GraftConfig(rules="auto"))
    assert torch.equal(logits(grafted), logits(original))
    assert isinstance(grafted.lm_head, PlainLinear)
    assert json.loads(grafted.config.to_json_string())["quantization_config"]["rules"] == "auto"


@pytest.mark.parametrize("what", ["a kept parameter is missing", "an expert is missing", "an expert of another shape"])
def test_from_pretrained_refuses_too(saved: Callable[..., Path], what: str) -> None:
    from transformers import AutoModelForCausalLM

    path = saved()
    change, message = SPOILED[what]
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=GraftConfig())


def test_device_map_is_refused(saved: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = saved("llama")
    with pytest.raises(ValueError, match="rules say where modules go"):
        load_and_optimize(path, device_map="auto")
    with pytest.raises((ValueError, ImportError)):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=GraftConfig(), device_map={"": "cpu"})


def test_arguments_that_mean_something_else(saved: Callable[..., Path]) -> None:
    path = saved("llama")
    for wrong in ({"torch_dtype": torch.float32}, {"quantization_config": {}}, {"dtype": "int8"}, {"dtype": "fp32"}):
        with pytest.raises(ValueError):
            load_and_optimize(path, **wrong)
    model = models.build(models.llama())
    with pytest.raises(ValueError, match="taken as it is"):
        load_and_optimize(model, dtype=torch.bfloat16)
    load_and_optimize(model)
    with pytest.raises(ValueError, match="grafted already"):
        load_and_optimize(model)
    with pytest.raises(ValueError, match="PreTrainedModel"):
        load_and_optimize(torch.nn.Linear(2, 2))


def test_the_model_knows_where_it_came_from(saved: Callable[..., Path]) -> None:
    path = saved("llama")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    model = load_and_optimize(str(path), dtype="bfloat16")
    assert model.name_or_path == str(path)
    assert model.generation_config.temperature == 0.25
    assert model.dtype is torch.bfloat16 and model.config.dtype is torch.bfloat16
    assert model.placement_report().ok and model.numagraft_plan.modules


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from numagraft import quantizer

    before = dict(AUTO_QUANTIZER_MAPPING)
    quantizer.register()
    assert before == AUTO_QUANTIZER_MAPPING
    importlib.reload(quantizer)
    assert AUTO_QUANTIZER_MAPPING.keys() == before.keys()
    with pytest.raises(ValueError, match="does not know ruls"):
        GraftConfig(ruls="auto")


def test_plain_loading_is_the_reference(saved: Callable[..., Path]) -> None:
    """Negative control of this file's fixtures: the same checkpoint through the same door loads."""
    assert torch.equal(logits(load_plain(saved())), logits(models.build(models.qwen3_moe())))
