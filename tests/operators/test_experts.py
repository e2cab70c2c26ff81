from __future__ import annotations

import pytest
import torch
from families import build, expert_classes
from grafting import EXPERTS_BARS, graft, relative_error, skeleton, with_unpacked_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from second_device import OTHER_TYPE, second_device
from small_experts import filled, gpt_oss, qwen, routed
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from numagraft.contract import Rejected
from numagraft.errors import UnsupportedOperationError, WeightError
from numagraft.operators.expert_contract import expert_shape
from numagraft.operators.experts import Experts
from numagraft.operators.params import PackedParams

FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")
NAMED = ("Qwen3MoeExperts", "MixtralExperts", "DeepseekV3Experts", "Glm4MoeExperts", "OlmoeExperts", "GptOssExperts")


def graft_experts(module: nn.Module, **kwargs) -> Experts:
    return graft(module, operator=Experts, **kwargs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_the_eager_module_does(name, format, dtype):
    module = filled(build(expert_classes()[name], "cpu"))
    grafted = graft_experts(module, format=format)
    x = torch.randn(40, grafted.shape.hidden).to(dtype)
    index, weights = routed(40, grafted.shape.experts)
    found = grafted(x, index, weights.to(dtype))
    expected = with_unpacked_experts(module, grafted)(x.float(), index, weights.to(dtype).float())
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert found.dtype == dtype and found.shape == x.shape
    assert relative_error(found, expected) <= EXPERTS_BARS[format] + rounding


def accepted_classes() -> list[str]:
    return [
        name
        for name, cls in sorted(expert_classes().items())
        if (module := build(cls)) is not None and not isinstance(expert_shape(module), Rejected)
    ]


@pytest.mark.parametrize("name", accepted_classes())
def test_every_accepted_family_agrees_with_its_eager_module(name):
    """The recognition is by identity of code; this holds the recognised code to what the kernel computes."""
    module = filled(build(expert_classes()[name], "cpu"))
    grafted = graft_experts(module, format="bf16")
    x = torch.randn(12, grafted.shape.hidden) * 3  # far enough out to reach gpt-oss's limit
    index, weights = routed(12, grafted.shape.experts)
    expected = with_unpacked_experts(module, grafted)(x, index, weights)
    assert relative_error(grafted(x, index, weights), expected) <= EXPERTS_BARS["bf16"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([qwen, gpt_oss]),
    st.tuples(st.integers(1, 9), st.integers(1, 130), st.integers(1, 150)),
    st.integers(1, 40),
    st.sampled_from(["shard", "mirror", "interleave", "bind"]),
    st.integers(1, 4),
)
def test_odd_shapes_on_every_placement(format, family, sizes, tokens, policy, nodes):
    module = family(*sizes)
    grafted = graft_experts(module, format=format, policy=policy, nodes=nodes)
    x = torch.randn(tokens, sizes[1])
    index, weights = routed(tokens, sizes[0], min(2, sizes[0]))
    found = grafted(x, index, weights)
    expected = with_unpacked_experts(module, grafted)(x, index, weights)
    # a handful of terms does not average the rounding out
    scale = expected.norm() + 0.3 * x.norm()
    assert ((found - expected).norm() / scale).item() <= 2.5 * EXPERTS_BARS[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("policy", ["shard", "mirror", "interleave", "bind"])
@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_placements_agree_with_one_node(format, policy, nodes, tokens):
    module = qwen(5, 64, 320)
    x = torch.randn(tokens, 64)
    index, weights = routed(tokens, 5)
    one = graft_experts(module, format=format)(x, index, weights)
    found = graft_experts(module, format=format, policy=policy, nodes=nodes)(x, index, weights)
    assert relative_error(found, one) < 1e-5 if format in ("bf16", "fp8") else relative_error(found, one) <= EXPERTS_BARS[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3000])
def test_few_and_many_tokens(format, tokens):
    module = qwen()
    grafted = graft_experts(module, format=format, policy="shard", nodes=2)
    x = torch.randn(tokens, 64)
    index, weights = routed(tokens, 6)
    expected = with_unpacked_experts(module, grafted)(x, index, weights)
    # one token is a small sample of the rounding
    slack = 2 if tokens < 10 else 1
    assert relative_error(grafted(x, index, weights), expected) <= slack * EXPERTS_BARS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_no_tokens_unchosen_experts_and_skips(format):
    module = qwen()
    grafted = graft_experts(module, format=format)
    nobody = torch.empty(0, 2, dtype=torch.int64)
    assert grafted(torch.empty(0, 64), nobody, torch.empty(0, 2)).shape == (0, 64)
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    same = torch.full((5, 2), 3)
    same[:, 1] = 4
    reference = with_unpacked_experts(qwen(), grafted)
    assert relative_error(grafted(x, same, weights), reference(x, same, weights)) <= 1.5 * EXPERTS_BARS[format]
    skipped = same.clone()
    skipped[:, 1] = 6  # the number of experts: skip
    assert relative_error(grafted(x, skipped, weights), reference(x, skipped, weights)) <= 1.5 * EXPERTS_BARS[format]
    skipped[2] = 6
    assert torch.equal(grafted(x, skipped, weights)[2], torch.zeros(64))


@pytest.mark.parametrize("index", [7, -1, 2**40])
@pytest.mark.parametrize("tokens", [3, 100])
def test_an_index_out_of_range_names_token_and_id(index, tokens):
    grafted = graft_experts(qwen())
    chosen, weights = routed(tokens, 6)
    chosen[2, 1] = index
    with pytest.raises(IndexError, match=rf"token 2\b.*{index}"):
        grafted(torch.randn(tokens, 64), chosen, weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [4, 200])
def test_a_bad_row_stays_in_its_row(format, bad, tokens):
    grafted = graft_experts(qwen(), format=format)
    x = torch.randn(tokens, 64)
    index, weights = routed(tokens, 6)
    clean = grafted(x, index, weights)
    x[1, 7] = bad
    found = grafted(x, index, weights)
    others = torch.arange(tokens) != 1
    torch.testing.assert_close(found[others], clean[others], rtol=0, atol=0)
    assert not torch.isfinite(found[1]).any()


@pytest.mark.parametrize("format", FORMATS)
def test_strides_and_dtypes_of_every_input(format):
    module = qwen()
    grafted = graft_experts(module, format=format)
    x = torch.randn(8, 64)
    index, weights = routed(8, 6)
    plain = grafted(x, index, weights)
    for other in (
        (torch.cat([x, x], 1)[:, :64], index, weights),
        (torch.stack([x, x], 2)[..., 0], index, weights),
        (x.t().contiguous().t(), index.t().contiguous().t(), weights.t().contiguous().t()),
        (x, index.to(torch.int32), weights),
        (x, torch.stack([index, index], 1)[:, 1], torch.stack([weights, weights], 2)[..., 1]),
    ):
        torch.testing.assert_close(grafted(*other), plain, rtol=1e-6, atol=1e-6)
    mixed = grafted(x.to(torch.bfloat16), index, weights)  # routers often hand over float32 weights
    assert mixed.dtype == torch.bfloat16 and relative_error(mixed, plain) < 0.02


def test_gpt_oss_names_its_arguments_differently():
    grafted = graft_experts(gpt_oss())
    x = torch.randn(3, 64)
    index, weights = routed(3, 6)
    assert torch.equal(grafted(x, router_indices=index, routing_weights=weights), grafted(x, index, weights))


@pytest.mark.parametrize("family", [qwen, gpt_oss])
@pytest.mark.parametrize("halves", [False, True])
def test_expert_by_expert_gives_the_same_as_fused(family, halves):
    module = family()
    whole = graft_experts(module, format="int4")
    grafted = skeleton(module, operator=Experts, params=PackedParams(format="int4"))
    shape = grafted.shape
    for expert in (3, 0, 5, 1, 4, 2):
        for name, parameter in module.named_parameters():
            one = parameter[expert]
            if not (halves and name.startswith("gate_up")):
                grafted.load(name, one, expert=expert)
                continue
            dimension = one.dim() - 1 if shape.transposed else 0
            step = slice(None, None, 2) if shape.gate.interleaved else slice(None, shape.intermediate)
            other = slice(1, None, 2) if shape.gate.interleaved else slice(shape.intermediate, None)
            for half, cut in (("gate", step), ("up", other)):
                piece = one[(slice(None),) * dimension + (cut,)]
                grafted.load(name.replace("gate_up", half), piece, expert=expert)
    grafted.finish()
    x = torch.randn(4, 64)
    index, weights = routed(4, 6)
    assert torch.equal(grafted(x, index, weights), whole(x, index, weights))


def test_the_life_of_the_placeholders():
    module = qwen()
    grafted = skeleton(module, operator=Experts, params=PackedParams())
    assert {key: tuple(p.shape) for key, p in grafted.state_dict().items()} == {
        "gate_up_proj": (6, 192, 64),
        "down_proj": (6, 64, 96),
    }
    assert grafted.missing() == ["gate_up_proj", "down_proj"]
    grafted.load("gate_up_proj", module.gate_up_proj[1], expert=1)
    grafted.load("up_proj", module.gate_up_proj[2, 96:], expert=2)
    grafted.load("down_proj", module.down_proj)
    absent = ["gate_up_proj[0]", "gate_proj[2]", "gate_up_proj[3]", "gate_up_proj[4]", "gate_up_proj[5]"]
    assert grafted.missing() == absent
    with pytest.raises(WeightError, match=r"m\.gate_up_proj\[0\]: never arrived\n.*m\.gate_proj\[2\]"):
        grafted.finish()
    grafted.load("gate_proj", module.gate_up_proj[2, :96], expert=2)
    for expert in (0, 3, 4, 5):
        grafted.load("gate_up_proj", module.gate_up_proj[expert], expert=expert)
    grafted.finish()
    assert not grafted.state_dict()
    assert grafted.num_experts == 6 and grafted.hidden_dim == 64 and grafted.config is module.config
    assert grafted.gate_up_proj.shape == (6, 192, 64)
    assert grafted.grafted_numel() == 6 * 3 * 96 * 64
    assert "experts=6, hidden=64, intermediate=96, gate=silu, bias=False, int8, bind" in repr(grafted)


@pytest.mark.parametrize(
    ("name", "tensor", "expert", "message"),
    [
        ("gate_up_proj", torch.ones(6, 192, 65), None, r"m\.gate_up_proj: found shape \[6, 192, 65\], expected \[6, 192, 64\]"),
        ("gate_up_proj", torch.ones(192, 65), 2, r"m\.gate_up_proj\[2\]: found shape \[192, 65\], expected \[192, 64\]"),
        ("up_proj", torch.ones(192, 64), 2, r"m\.up_proj\[2\]: found shape \[192, 64\], expected \[96, 64\]"),
        ("up_proj", torch.ones(6, 96, 64), None, "say which expert"),
        ("down_proj", torch.ones(64, 96), 6, "no expert 6; the module has 6"),
        ("down_proj", torch.ones(64, 96), -1, "no expert -1"),
        ("down_proj_bias", torch.ones(6, 64), None, "no tensor named 'down_proj_bias'; it has: gate_up_proj, down_proj"),
        ("w1", torch.ones(96, 64), 0, "no tensor named 'w1'"),
        ("down_proj", torch.ones(6, 64, 96, dtype=torch.uint8), None, "found dtype uint8"),
        ("down_proj", torch.ones(6, 64, 96, device="meta"), None, "on meta, expected cpu"),
    ],
)
def test_a_wrong_tensor_is_refused_before_anything_is_stored(name, tensor, expert, message):
    grafted = skeleton(qwen(), operator=Experts, params=PackedParams())
    with pytest.raises(WeightError, match=message):
        grafted.load(name, tensor, expert=expert)
    assert grafted.missing() == ["gate_up_proj", "down_proj"] and grafted.grafted_bytes() == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(("gate_up_proj", None), ("gate_up_proj", 1)), (("up_proj", 1), ("gate_up_proj", None)), (("up_proj", 1), ("up_proj", 1))],
)
def test_an_expert_that_comes_twice_is_refused(first, second):
    module = qwen()
    grafted = skeleton(module, operator=Experts, params=PackedParams())

    def tensor(name, expert):
        return module.gate_up_proj[1, 96:] if name == "up_proj" else module.gate_up_proj[slice(None) if expert is None else 1]

    grafted.load(first[0], tensor(*first), expert=first[1])
    with pytest.raises(WeightError, match=r"came twice: expert [01]"):
        grafted.load(second[0], tensor(*second), expert=second[1])


def test_inputs_that_do_not_fit():
    grafted = graft_experts(qwen())
    index, weights = routed(3, 6)
    for x, chosen, shares in [
        (torch.randn(3, 63), index, weights),
        (torch.randn(4, 64), index, weights),
        (torch.randn(3, 64), index, weights[:, :1]),
    ]:
        with pytest.raises(UnsupportedOperationError, match=r"m: found hidden_states .* expected \[T, 64\], \[T, k\], \[T, k\]"):
            grafted(x, chosen, shares)
    with pytest.raises(UnsupportedOperationError, match="dtype float64"):
        grafted(torch.randn(3, 64, dtype=torch.float64), index, weights)
    with pytest.raises(UnsupportedOperationError, match=r"top_k_index of dtype torch\.float32, expected integers"):
        grafted(torch.randn(3, 64), index.float(), weights)
    for grads in ((True, False), (False, True)):
        with pytest.raises(UnsupportedOperationError, match="no gradients"):
            grafted(torch.randn(3, 64, requires_grad=grads[0]), index, weights.clone().requires_grad_(grads[1]))


def test_inside_the_block_of_its_family():
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=96, num_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config).requires_grad_(False)
    nn.init.normal_(block.gate.weight)
    block.experts = filled(block.experts)
    x = torch.randn(2, 9, 64)
    expected = block(x)
    block.experts = graft_experts(block.experts, format="bf16")
    assert relative_error(block(x), expected) <= 2 * EXPERTS_BARS["bf16"]


def test_units_and_footprint():
    from grafting import place

    module = qwen(8, 64, 320, top_k=2)
    units = Experts.units(module, PackedParams(format="int8"))
    assert units.count == 320 and units.multiple == 64 and units.packed_bytes >= 3 * 8 * 64 * 320
    assert Experts.units(module, PackedParams(format="int4", group=128)).multiple == 128
    assert Experts.units(module, PackedParams(format="fp8")).multiple == 128
    for policy in ("shard", "mirror"):
        footprint = Experts.footprint(module, PackedParams(), place(policy, 2, 320, 64), "cpu")
        assert 0.9 * units.packed_bytes / 4 <= footprint.bytes_per_token <= 1.2 * units.packed_bytes / 4
        assert sum(footprint.node_bytes.values()) >= units.packed_bytes * (2 if policy == "mirror" else 1)


def test_inputs_from_another_device_are_moved_there_and_back():
    grafted = graft_experts(qwen())
    x = torch.randn(3, 64)
    index, weights = routed(3, 6)
    with torch.no_grad():
        expected = grafted(x, index, weights)
    with second_device(OTHER_TYPE):
        found = grafted(x.to(OTHER_TYPE), index.to(OTHER_TYPE), weights.to(OTHER_TYPE))
        assert found.device == OTHER_TYPE
        assert torch.equal(found.to("cpu"), expected)
        mixed = grafted(x, index.to(OTHER_TYPE), weights)
        assert mixed.device.type == "cpu" and torch.equal(mixed, expected)


def test_meta_inputs_have_shapes():
    grafted = graft_experts(qwen())
    x = torch.empty(5, 64, device="meta", dtype=torch.bfloat16)
    y = grafted(x, torch.empty(5, 2, device="meta", dtype=torch.int64), torch.empty(5, 2, device="meta"))
    assert y.is_meta and y.shape == (5, 64) and y.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    grafted = graft_experts(qwen())
    compiled = torch.compile(grafted, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    index, weights = routed(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, index, weights), grafted(x, index, weights))
