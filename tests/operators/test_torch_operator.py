from __future__ import annotations

import inspect

import pytest
import torch
from second_device import DEVICE, second_device
from torch import nn
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from numagraft.contract import Accepted, Rejected
from numagraft.errors import ConfigurationError, WeightError
from numagraft.operators.torch_operator import Torch

LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
    bos_token_id=1, eos_token_id=2,
)


class Nested(nn.Module):
    """Takes and returns tensors in containers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("offset", torch.randn(4))
        self.register_buffer("scratch", torch.randn(4), persistent=False)

    def forward(self, states: dict, *, extra=None):
        out = self.inner(states["x"][0]) + self.offset + self.scratch
        return {"out": (out,), "extra": extra, "n": 3}


def graft(module: nn.Module, device: torch.device | str, name: str = "m") -> Torch:
    return Torch.from_module(module, Torch.Params(), name=name, placement=None, runtime=None, device=str(device))


def graft_and_load(module: nn.Module, device: torch.device | str) -> Torch:
    grafted = graft(module, device)
    for name, tensor in module.state_dict().items():
        grafted.load(name, tensor)
    grafted.finish()
    return grafted


def test_arguments_cross_over_and_results_come_back():
    module = Nested()
    states = {"x": (torch.randn(2, 4), None), "y": "text"}
    expected = module(states)["out"][0]
    with second_device() as crossings:
        grafted = graft_and_load(module, DEVICE)
        assert {t.device for t in [*grafted.parameters(), *grafted.buffers()]} == {DEVICE}
        crossings.there.clear()
        result = grafted(states, extra=[torch.ones(5)])
    torch.testing.assert_close(result["out"][0], expected)
    assert result["extra"][0].device.type == "cpu" and result["n"] == 3
    assert crossings.there == [(2, 4), (5,)]
    assert sorted(crossings.back) == [(2, 4), (5,)]


def test_without_the_crossing_the_stand_in_refuses():
    """The negative control of the test above: the device does not mix tensors by itself."""
    module = Nested()
    with second_device():
        grafted = graft_and_load(module, DEVICE)
        with pytest.raises(RuntimeError, match="one device"):
            Nested.forward(grafted, {"x": (torch.randn(2, 4),)})


def test_an_input_already_there_stays_there():
    with second_device() as crossings:
        grafted = graft_and_load(nn.Linear(4, 3), DEVICE)
        x = torch.randn(2, 4).to(DEVICE)
        crossings.there.clear()
        assert grafted(x).device == DEVICE
    assert crossings.there == [] and crossings.back == []


def test_a_whole_model_generates_with_layers_elsewhere():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    ids = torch.randint(0, 32, (2, 5))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with second_device() as crossings:
        model.model.layers[1] = graft_and_load(model.model.layers[1], DEVICE)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    assert (2, 5, 16) in crossings.there and (2, 1, 16) in crossings.back


def test_it_is_still_what_it_was():
    layer = LlamaDecoderLayer(LLAMA, 0)
    grafted = graft(layer, "cpu")
    assert isinstance(grafted, LlamaDecoderLayer) and "LlamaDecoderLayer" in type(grafted).__name__
    assert inspect.signature(grafted.forward) == inspect.signature(layer.forward)
    assert list(grafted.state_dict()) == list(layer.state_dict())
    assert grafted.hidden_size == layer.hidden_size
    assert grafted.self_attn is layer.self_attn
    assert "device=cpu" in repr(graft(nn.Linear(2, 3), "cpu"))


def test_placeholders_keep_names_shapes_dtypes_until_loaded():
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=3, num_experts_per_tok=2)
        ).to(torch.bfloat16)
    grafted = graft(block, "cpu")
    assert {name: (p.shape, p.dtype) for name, p in grafted.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in block.named_parameters()
    }
    assert grafted.missing() == ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    grafted.load("gate.weight", torch.randn(3, 8))
    fused = torch.randn(3, 8, 8)
    for expert in (2, 0):
        grafted.load("experts.gate_up_proj", fused[expert], expert=expert)
    assert grafted.missing() == ["experts.gate_up_proj[1]", "experts.down_proj"]
    with pytest.raises(WeightError, match=r"m\.experts\.gate_up_proj\[1\]: never arrived\n.*down_proj"):
        grafted.finish()
    grafted.load("experts.gate_up_proj", fused[1], expert=1)
    grafted.load("experts.down_proj", torch.randn(3, 8, 4))
    grafted.finish()
    assert torch.equal(grafted.experts.gate_up_proj, fused.to(torch.bfloat16))
    x = torch.randn(1, 5, 8, dtype=torch.bfloat16)
    assert grafted(x).shape == x.shape


def test_a_buffer_left_on_meta_is_named():
    with torch.device("meta"):
        rotary = LlamaRotaryEmbedding(LLAMA)
    with pytest.raises(WeightError, match=r"m\.inv_freq: never arrived"):
        graft(rotary, "cpu").finish()


def test_a_tied_parameter_set_from_outside_is_moved_by_finish():
    module = nn.Linear(4, 3, bias=False)
    weight = module.weight
    with second_device():
        grafted = graft(module, DEVICE)
        grafted.finish()
        assert grafted.weight.device == DEVICE
        assert torch.equal(grafted.weight.to("cpu"), weight)


@pytest.mark.parametrize(
    ("name", "tensor", "expert", "message"),
    [
        ("weight", torch.ones(3, 5), None, r"m\.weight: found shape \[3, 5\], expected \[3, 4\]"),
        ("wieght", torch.ones(3, 4), None, r"no tensor named 'wieght'; did you mean weight"),
        ("a.b", torch.ones(3, 4), None, r"no tensor named 'a.b'; it has: weight, bias"),
        ("weight", torch.ones(3, 4, device="meta"), None, "no values"),
        ("weight", torch.ones(3, 4, dtype=torch.int32), None, r"found dtype torch.int32"),
        ("weight", torch.ones(4), 3, r"no expert 3; the parameter's shape is \[3, 4\]"),
        ("weight", torch.ones(3), 0, r"found shape \[3\], expected \[4\]"),
    ],
)
def test_a_wrong_tensor_is_refused_before_anything_is_stored(name, tensor, expert, message):
    with torch.device("meta"):
        grafted = graft(nn.Linear(4, 3), "cpu")
    with pytest.raises(WeightError, match=message):
        grafted.load(name, tensor, expert=expert)
    assert grafted.missing() == ["weight", "bias"]


@pytest.mark.parametrize("experts", [(None, None), (0, 0), (0, None), (None, 0)])
def test_the_same_weight_twice_is_refused(experts):
    grafted = graft(nn.Linear(4, 3), "cpu")
    pieces = {None: torch.ones(3, 4), 0: torch.ones(4)}
    grafted.load("weight", pieces[experts[0]], expert=experts[0])
    with pytest.raises(WeightError, match="came twice"):
        grafted.load("weight", pieces[experts[1]], expert=experts[1])


def test_a_slice_does_not_keep_the_whole_tensor_alive():
    grafted = graft(nn.Linear(4, 3), "cpu")
    grafted.load("weight", torch.randn(30, 4)[3:6])
    assert grafted.weight.untyped_storage().nbytes() == 3 * 4 * 4


def test_check_verdicts():
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    named = type("Named", (nn.Module,), {"load": lambda self: None, "forward": lambda self, x: x})()
    for module, reason in [
        (patched, "on the instance"),
        (nn.LazyLinear(2), "no shape yet"),
        (named, "uses the name 'load'"),
        (graft(nn.Linear(2, 2), "cpu"), "replaced already"),
    ]:
        verdict = Torch.check(module, Torch.Params(), None)
        assert isinstance(verdict, Rejected) and reason in verdict.reason
    assert Torch.check(LlamaForCausalLM(LLAMA), Torch.Params(), None) == Accepted()


def test_devices():
    assert Torch.check_device("cuda:3", None) == Accepted()
    assert "not a torch device" in Torch.check_device("gpu", None).reason
    assert "meta" in Torch.check_device("meta", None).reason
    with pytest.raises(ConfigurationError, match="m: the torch operator cannot use device 'meta'"):
        graft(nn.Linear(2, 2), "meta")


def test_footprint_counts_parameters_and_buffers():
    footprint = Torch.footprint(Nested(), Torch.Params(), None, "cuda:0")
    assert footprint.device_bytes == {"cuda:0": (16 + 4 + 4 + 4) * 4} and footprint.node_bytes == {}


@pytest.mark.gpu
def test_on_a_real_second_device():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    ids = torch.randint(0, 32, (2, 5))
    with torch.no_grad():
        expected = model(ids).logits
        model.model.layers[1] = graft_and_load(model.model.layers[1], "cuda:0")
        result = model(ids).logits
    assert result.device.type == "cpu"
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
