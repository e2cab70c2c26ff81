"""Every family's modules have the role that they play, and only one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from numagraft import skeleton
from numagraft.roles import ROLES, count_experts, role_of, survey

from . import families, table


@pytest.mark.parametrize("title", families.FAMILIES)
def test_roles_of_a_family(title):
    model = families.build(title)
    infos = survey(model)
    by_name = {info.name: info for info in infos}
    text = [info for info in infos if info.tower == "text"]
    roles = {info.role for info in text}
    assert roles <= {*ROLES, None}
    assert len(by_name) == len(infos), "every module once"
    assert [info.name for info in infos if info.role == "lm_head"] == ["lm_head"]
    assert "decoder_layer" in roles and "norm" in roles
    assert ("attention" in roles) == (title not in families.WITHOUT_ATTENTION)
    moe = title in families.MIXTURES
    assert {"experts", "router", "moe"} <= roles if moe else not {"experts", "router", "moe"} & roles
    if not moe and title not in families.WITHOUT_MLP:
        assert "mlp" in roles
    for info in infos:
        if info.role == "experts":
            assert count_experts(info.module) > 1
        if info.role == "linear":
            assert isinstance(info.module, nn.Linear) and info.module.out_features > 1
            assert "router" not in type(info.module).__name__.lower()
        if isinstance(info.module, nn.Linear) and info.role is None:
            assert info.module.out_features == 1 or info.tower != "text"
    layers = [info for info in text if info.role == "decoder_layer"]
    assert [info.layer for info in layers] == list(range(len(layers)))
    for info in text:
        inside = [layer for layer in layers if info.name.startswith(f"{layer.name}.")]
        assert info.layer == (inside[0].layer if inside else info.layer)


@pytest.mark.parametrize(
    ("title", "name", "role"),
    [
        ("Qwen3-Next", "model.layers.0.mlp.shared_expert_gate", "shared_expert_gate"),
        ("Qwen3-Next", "model.layers.0.linear_attn", "attention"),
        ("Llama 4", "model.layers.0.feed_forward.router", "router"),
        ("gpt-oss", "model.layers.0.mlp", "moe"),
        ("Phi-MoE", "model.layers.0.mlp.router", "router"),
        ("DeepSeek-V3", "model.layers.0.mlp", "mlp"),
        ("DeepSeek-V3", "model.layers.1.mlp.shared_experts", "shared_experts"),
        ("DeepSeek-V3", "model.layers.1.mlp.shared_experts.up_proj", "linear"),
        ("LongCat-Flash", "model.layers.0.mlp.router.classifier", "router"),
        ("JetMoE", "model.layers.0.mlp.router.layer", "router"),
        ("Granite-MoE-Hybrid", "model.layers.0.shared_mlp", "shared_experts"),
        ("OPT", "model.decoder.layers.0.fc1", "linear"),
        ("Gemma 3", "model.vision_tower.head.attention.out_proj", None),
    ],
)
def test_modules_that_are_easily_mistaken(title, name, role):
    assert role_of(families.build(title), name) == role


def test_towers():
    towers = {info.name: info.tower for info in survey(families.build("Gemma 3"))}
    assert towers["model.vision_tower.encoder.layers.0.mlp.fc1"] == "vision"
    assert towers["model.multi_modal_projector"] == "vision"
    assert towers["model.language_model.layers.0.mlp"] == "text"


def test_roles_survive_renames():
    model = skeleton.build(AutoConfig.for_model("qwen2_moe", num_hidden_layers=2))
    before = {id(info.module): info.role for info in survey(model)}
    for layer in model.model.layers:
        block = layer.mlp
        for old, new in (("gate", "scorer"), ("experts", "pool"), ("shared_expert_gate", "mixing")):
            block.add_module(new, block._modules.pop(old))
        layer.add_module("feed", layer._modules.pop("mlp"))
        layer.add_module("mix", layer._modules.pop("self_attn"))
    model.model.add_module("stack", model.model._modules.pop("layers"))
    after = {id(info.module): info.role for info in survey(model)}
    assert after == before


def test_a_router_that_subclasses_linear_is_no_linear():
    class Scores(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(4, 8, 8))
            self.down_proj = nn.Parameter(torch.empty(4, 8, 4))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Scores(8, 4)
            self.experts = Experts()
            self.weigher = nn.Linear(8, 1)

    model = nn.Module()
    model.block = Block()
    found = {info.name: info.role for info in survey(model)}
    assert found == {
        "block": "moe",
        "block.gate": "router",
        "block.experts": "experts",
        "block.weigher": "shared_expert_gate",
    }


def test_a_convolution_is_no_experts():
    assert count_experts(nn.Conv1d(8, 8, 3)) is None


def test_the_table_in_the_docs_is_current():
    page = table.PAGE.read_text()
    assert table.replace_generated(page, table.generate(families)) == page, "run: python tests/roles/table.py"
