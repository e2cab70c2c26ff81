"""The torch operator through the real loader: a subtree with buffers of its own must come out whole."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from numagraft.api import carry_out
from numagraft.checkpoints import open_checkpoint
from numagraft.checkpoints.memory import skeleton_of
from numagraft.loading import Load
from numagraft.operators.torch_operator import Torch
from numagraft.planning import Plan, PlannedModule
from numagraft.quantizer import GraftConfig
from numagraft.rulefile.rules import Location
from numagraft.runtime import RuntimeLayout
from tests import models

TOKENS = torch.tensor([[1, 5, 9, 30, 77, 3]])


@pytest.fixture(autouse=True)
def unproven(monkeypatch):
    loading = importlib.import_module("numagraft.loading")
    report = SimpleNamespace(require=lambda: None)
    monkeypatch.setattr(loading, "make_reporter", lambda *_: lambda: report)


def plan_torch(skeleton: torch.nn.Module, names: list[str]) -> Plan:
    def planned(name):
        kind = type(skeleton.get_submodule(name)).__name__
        location = Location("test.yaml", 1, 1)
        return PlannedModule(name, kind, "mlp", "r", location, "torch", "cpu", Torch.Params(), None, {}, {}, 0)

    layout = RuntimeLayout.virtual(1)
    return Plan(type(skeleton).__name__, "test.yaml", layout, tuple(planned(name) for name in names), kept_bytes=0)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "names",
    [["model.rotary_emb"], ["model.layers.0", "model.layers.1.mlp"], ["model"], ["model.embed_tokens", "lm_head"]],
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_equal_to_the_bit(tmp_path, names, family, tied):
    original = models.build(models.CONFIGS[family](tie_word_embeddings=tied))
    path = models.save(original, tmp_path)
    with open_checkpoint(path) as source:
        with torch.device("meta"):
            skeleton = models.build(source.config, dtype=torch.float32)
        grafted = carry_out(plan_torch(skeleton, names), source, skeleton, dtype=torch.float32, config=GraftConfig())
    assert all(isinstance(grafted.get_submodule(name), Torch) for name in names)
    assert torch.equal(logits(grafted), logits(original))


@pytest.mark.parametrize("names", [["model.rotary_emb", "model.layers.1"], ["model"]])
def test_a_model_in_memory(names):
    model = models.build(models.llama())
    expected = logits(model)
    skeleton = skeleton_of(model)
    grafted = Load(plan_torch(skeleton, names)).graft_in_memory(model, skeleton)
    assert torch.equal(logits(grafted), expected)
