"""Kept modules on another device: hooks move what goes in and what comes out, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from numagraft import crossings
from tests import models
from tests.grafting import TOKENS, graft_plain, logits, skeleton_for
from tests.plain_operators import plan_plain

CUDA = torch.device("cuda:0")


def plan_kept(devices: dict[str, str]) -> Any:
    """A plan that keeps modules of a small model and sends them to devices."""
    plan = plan_plain(skeleton_for(models.llama()))
    example = plan.modules[0]
    kept = tuple(replace(example, name=name, operator="default", device=device) for name, device in devices.items())
    return replace(plan, modules=kept)


def test_the_nearest_planned_ancestor_decides() -> None:
    plan = plan_kept({"model.layers.1": "cuda:0", "model.layers.1.mlp": "cpu", "lm_head": "cuda:1"})
    devices = crossings.devices_by_module(plan)
    assert crossings.device_of("model.layers.1.self_attn.q_proj.weight", devices) == CUDA
    assert crossings.device_of("model.layers.1.mlp.gate_proj.weight", devices) == torch.device("cpu")
    assert crossings.device_of("model.layers.10.mlp", devices) == torch.device("cpu")
    assert crossings.device_of("lm_head.weight", devices) == torch.device("cuda:1")


def test_hooks_stand_only_where_devices_change() -> None:
    plan = plan_kept({"model.layers.0": "cpu", "model.layers.1": "meta", "model.layers.1.mlp": "meta"})
    model = models.build(models.llama())
    assert crossings.add_crossings(model, plan) == ["model.layers.1"]


def test_inputs_cross_there_and_outputs_back() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor, *, rest: dict[str, Any]) -> dict[str, Any]:
            self.seen = (x.device.type, rest["deep"][0].device.type, rest["text"])
            return {"y": (x, rest["deep"][0]), "other": rest["text"]}

    inner = Inner()
    meta, cpu = torch.device("meta"), torch.device("cpu")
    crossings.add_crossing(inner, cpu, meta)  # "home" is meta here: every tensor that comes back must be there
    out = inner(torch.ones(2), rest={"deep": [torch.ones(3)], "text": "as it is"})
    assert inner.seen == ("cpu", "cpu", "as it is")
    assert [tensor.device for tensor in out["y"]] == [meta, meta] and out["other"] == "as it is"
    # negative control: without the crossing nothing moves
    assert Inner()(torch.ones(2), rest={"deep": [torch.ones(3)], "text": ""})["y"][0].device == cpu


@pytest.mark.gpu
def test_a_layer_on_another_device_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(models.llama())
    expected = logits(model)
    monkeypatch.setattr("tests.grafting.plan_plain", lambda _: plan_kept({"model.layers.1": "cuda:0"}))
    grafted = graft_plain(model)
    assert grafted.model.layers[1].mlp.up_proj.weight.device == CUDA
    found = logits(grafted, TOKENS)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
