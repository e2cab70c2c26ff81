from __future__ import annotations

import copy
import pickle

import pytest
import torch
from grafting import LINEAR_BARS, graft, relative_error, skeleton, unpacked_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from second_device import OTHER_TYPE, second_device
from torch import nn

from numagraft.contract import Accepted, Rejected
from numagraft.errors import ConfigurationError, UnsupportedOperationError, WeightError
from numagraft.operators.linear import Linear
from numagraft.operators.params import PackedParams

FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")


def linear(out_features: int = 96, in_features: int = 128, *, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(out_features * 1000 + in_features)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)


def expected(module: nn.Linear, grafted: Linear, x: torch.Tensor) -> torch.Tensor:
    """fp32, with the values that the packed weights stand for."""
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), unpacked_linear(grafted), bias)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_linear_layer(format, dtype, bias):
    module = linear(bias=bias)
    grafted = graft(module, format=format)
    x = torch.randn(3, 5, 128).to(dtype)
    y = grafted(x)
    assert y.dtype == dtype and y.shape == (3, 5, 96) and y.is_contiguous()
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert relative_error(y, expected(module, grafted, x)) <= LINEAR_BARS[format] + rounding


@pytest.mark.parametrize("format", FORMATS)
def test_the_packed_values_are_near_the_original(format):
    module = linear(bias=False)
    step = {"bf16": 3e-3, "int8": 1.2e-2, "int4": 0.13, "fp8": 0.04, "mxfp4": 0.15}[format]
    assert relative_error(unpacked_linear(graft(module, format=format)), module.weight) < step


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from(["shard", "mirror", "interleave", "bind"]),
    st.integers(1, 4),
)
def test_odd_shapes_on_every_placement(format, out_features, in_features, tokens, policy, nodes):
    module = linear(out_features, in_features)
    grafted = graft(module, format=format, policy=policy, nodes=nodes)
    x = torch.randn(tokens, in_features)
    want = expected(module, grafted, x)
    # few terms do not average the rounding out: a row's error against the size of its terms, not of their sum
    scale = (x.norm(dim=1, keepdim=True) * unpacked_linear(grafted).norm(dim=1)).clamp_min(1e-6)
    assert ((grafted(x) - want).abs() / scale).max().item() <= 2 * LINEAR_BARS[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("policy", ["shard", "mirror", "interleave", "bind"])
@pytest.mark.parametrize("tokens", [1, 7, 1100])
def test_placements_agree_with_one_node(format, nodes, policy, tokens):
    module = linear(200, 96)
    x = torch.randn(tokens, 96)
    torch.testing.assert_close(
        graft(module, format=format, policy=policy, nodes=nodes)(x), graft(module, format=format)(x), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("format", FORMATS)
def test_strange_inputs(format):
    module = linear()
    grafted = graft(module, format=format)
    bar = LINEAR_BARS[format]
    wide = torch.randn(6, 256)
    for x in (wide[:, ::2], wide[::2, :128], wide[:, :128].T.contiguous().T, torch.randn(128), torch.randn(2, 1, 3, 128)):
        assert relative_error(grafted(x), expected(module, grafted, x)) <= bar
    expanded = torch.randn(1, 128).expand(4, 128)
    assert relative_error(grafted(expanded), expected(module, grafted, expanded)) <= bar
    assert grafted(torch.empty(0, 128)).shape == (0, 96)
    assert grafted(torch.empty(2, 0, 128, dtype=torch.bfloat16)).shape == (2, 0, 96)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [3, 70])
def test_a_bad_row_stays_in_its_row(format, bad, tokens):
    grafted = graft(linear(), format=format)
    x = torch.randn(tokens, 128)
    clean = grafted(x)
    x[1, 5] = bad
    found = grafted(x)
    others = torch.arange(tokens) != 1
    torch.testing.assert_close(found[others], clean[others], rtol=0, atol=0)
    assert not torch.isfinite(found[1]).any()


def test_the_life_of_the_placeholders():
    module = linear(dtype=torch.bfloat16)
    grafted = skeleton(module, operator=Linear, params=PackedParams())
    assert {key: (p.shape, p.dtype, p.is_meta) for key, p in grafted.state_dict().items()} == {
        "weight": ((96, 128), torch.bfloat16, True),
        "bias": ((96,), torch.bfloat16, True),
    }
    assert grafted.missing() == ["weight", "bias"] and grafted.grafted_numel() == 0 and not list(grafted.buffers_placed())
    grafted.load("bias", module.bias)
    with pytest.raises(WeightError, match=r"m\.weight: never arrived"):
        grafted.finish()
    assert grafted.weight.is_meta
    grafted.load("weight", module.weight)
    grafted.finish()
    assert not grafted.state_dict() and not list(grafted.parameters())
    assert grafted.weight.dtype == torch.bfloat16 and grafted.weight.shape == (96, 128)
    assert grafted.weight.device == torch.device("cpu")
    with pytest.raises(UnsupportedOperationError, match=r"m\.weight is packed"):
        nn.functional.linear(torch.ones(1, 128), grafted.weight)
    assert (grafted.in_features, grafted.out_features) == (128, 96)
    assert grafted.grafted_numel() == 96 * 128 + 96
    assert grafted.grafted_bytes() > 0
    assert next(iter(grafted.buffers_placed())).owner == "m"
    assert "in_features=128, out_features=96, bias=True, int8, bind" in repr(grafted)


def test_no_bias_stays_none():
    grafted = graft(linear(bias=False))
    assert grafted.bias is None and "bias=False" in repr(grafted)


@pytest.mark.parametrize(
    ("name", "tensor", "expert", "message"),
    [
        ("weight", torch.ones(96, 127), None, r"m\.weight: found shape \[96, 127\], expected \[96, 128\]"),
        ("weight", torch.ones(96, 128, dtype=torch.float64), None, "found dtype float64, expected one of float32"),
        ("weight", torch.ones(96, 128, device="meta"), None, "on meta, expected cpu"),
        ("weight", torch.ones(96, 128), 0, "no experts, found expert=0"),
        ("weights", torch.ones(96, 128), None, r"no tensor named 'weights'; it has: weight, bias"),
    ],
)
def test_a_wrong_tensor_is_refused_before_anything_is_stored(name, tensor, expert, message):
    grafted = skeleton(linear(), operator=Linear, params=PackedParams())
    with pytest.raises(WeightError, match=message):
        grafted.load(name, tensor, expert=expert)
    assert grafted.missing() == ["weight", "bias"] and grafted.grafted_bytes() == 0


def test_a_tensor_that_comes_twice_is_refused():
    module = linear()
    grafted = skeleton(module, operator=Linear, params=PackedParams())
    grafted.load("weight", module.weight)
    with pytest.raises(WeightError, match=r"m\.weight came twice"):
        grafted.load("weight", module.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_and_stride_load(dtype):
    module = linear(bias=False, dtype=dtype)
    packed = unpacked_linear(graft(module, format="bf16"))
    assert relative_error(packed, module.weight) < 3e-3
    module.weight = nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)
    assert torch.equal(unpacked_linear(graft(module, format="bf16")), packed)


def test_gradients_are_refused_only_where_they_would_be_made():
    grafted = graft(linear())
    x = torch.randn(2, 128, requires_grad=True)
    with pytest.raises(UnsupportedOperationError, match=r"m: packed weights have no gradients.*torch\.no_grad"):
        grafted(x)
    with torch.no_grad():
        assert grafted(x).shape == (2, 96)
    assert grafted(x.detach()).shape == (2, 96)
    with torch.inference_mode():
        assert grafted(torch.randn(2, 128)).shape == (2, 96)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 127), r"m: found an input of shape \[2, 127\], expected \[..., 128\]"),
        (torch.tensor(1.0), r"shape \[\]"),
        (torch.randn(2, 128, dtype=torch.float64), "dtype float64, expected one of float32, bfloat16, float16"),
        (torch.ones(2, 128, dtype=torch.int64), "dtype int64"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    with pytest.raises(UnsupportedOperationError, match=message):
        graft(linear())(x)


def test_copies_are_refused():
    grafted = graft(linear())
    with pytest.raises(UnsupportedOperationError, match="cannot be copied"):
        copy.deepcopy(nn.Sequential(grafted))
    with pytest.raises(UnsupportedOperationError, match="cannot be pickled"):
        pickle.dumps(grafted)


def test_an_input_from_another_device_is_moved_there_and_back():
    grafted = graft(linear())
    x = torch.randn(3, 128)
    with torch.no_grad():
        expected = grafted(x)
    with second_device(OTHER_TYPE) as crossings:
        found = grafted(x.to(OTHER_TYPE))
        assert found.device == OTHER_TYPE and torch.equal(found.to("cpu"), expected)
    assert crossings.back == [(3, 128), (3, 96)] and crossings.there == [(3, 128), (3, 96)]


def test_meta_inputs_have_shapes():
    y = graft(linear())(torch.empty(2, 3, 128, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (2, 3, 96) and y.dtype == torch.bfloat16


def test_check_verdicts():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    class Renamed(nn.Linear):
        pass

    def changed(change) -> nn.Linear:
        module = linear()
        change(module)
        return module

    float8 = nn.Parameter(torch.empty(96, 128, dtype=torch.float8_e4m3fn), requires_grad=False)
    for module, reason in [
        (nn.Conv1d(1, 1, 1), "Conv1d is not an nn.Linear"),
        (Router(4, 4), "Router is an nn.Linear with a forward of its own"),
        (changed(lambda m: setattr(m, "forward", lambda x: x)), "replaced on the instance"),
        (changed(lambda m: m.register_forward_pre_hook(lambda *a: None)), "carries hooks"),
        (changed(lambda m: setattr(m, "weight", float8)), "weight is float8_e4m3fn"),
        (changed(lambda m: setattr(m, "extra", nn.Parameter(torch.ones(1)))), "also holds extra"),
        (nn.LazyLinear(4), "carries hooks"),
        (nn.utils.parametrizations.weight_norm(linear()), "no parameter weight"),
    ]:
        verdict = Linear.check(module, PackedParams(), None)
        assert isinstance(verdict, Rejected) and reason in verdict.reason, verdict
    assert Linear.check(Renamed(4, 4), PackedParams(), None) == Accepted()
    assert Linear.check(linear(bias=False), PackedParams(), None) == Accepted()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"format": "int8", "group": 64}, "group=64 is for format int4"),
        ({"format": "bf16", "symmetric": True}, "symmetric is for format int4"),
        ({"format": "bf16", "activations": "int8"}, "needs integer weights"),
        ({"format": "fp8", "activations": "int8"}, "needs integer weights"),
        ({"format": "mxfp4", "group": 128}, "group=128 is for format int4"),
    ],
)
def test_kwargs_that_would_be_ignored_are_rejected(kwargs, reason):
    assert reason in Linear.check(linear(), PackedParams(**kwargs), None).reason


def test_it_runs_on_cpu_only():
    assert "runs on cpu only" in Linear.check_device("cuda:0", None).reason
    with pytest.raises(ConfigurationError, match="m: the linear operator: it runs on cpu only, not on 'cuda:0'"):
        Linear.from_module(linear(), PackedParams(), name="m", placement=None, runtime=None, device="cuda:0")


def test_units_and_footprint():
    module, params = linear(200, 96), PackedParams(format="int8")
    units = Linear.units(module, params)
    assert units.count == 200 and units.packed_bytes >= 200 * 96
    from grafting import place

    for policy, nodes in (("shard", 2), ("mirror", 2), ("interleave", 2), ("bind", 2)):
        footprint = Linear.footprint(module, params, place(policy, nodes, 200, units.multiple), "cpu")
        total = sum(footprint.node_bytes.values())
        assert set(footprint.node_bytes) == ({1} if policy == "bind" else {0, 1})
        assert total >= units.packed_bytes * (2 if policy == "mirror" else 1)
        assert units.packed_bytes <= footprint.bytes_per_token < 1.2 * units.packed_bytes


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    grafted = graft(linear())
    block = nn.Sequential(grafted, nn.ReLU())
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 128)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
        torch.testing.assert_close(compiled(x[:2]), block(x[:2]))


KWARGS = [
    {"format": format, "group": group, "symmetric": symmetric, "activations": activations}
    for format in FORMATS
    for group in (32, 64, 128)
    for symmetric in (False, True)
    for activations in ("auto", "int8", "bf16")
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=lambda kwargs: "-".join(map(str, kwargs.values())))
def test_every_combination_of_kwargs_computes_or_is_refused(kwargs):
    module = linear(200, 300)
    params = PackedParams(**kwargs)
    if params.conflict() is not None:
        assert isinstance(Linear.check(module, params, None), Rejected)
        return
    grafted = graft(module, **kwargs)
    for tokens in (1, 33):
        x = torch.randn(tokens, 300)
        bar = LINEAR_BARS[kwargs["format"]]
        if kwargs["activations"] == "bf16" and grafted.weights.isa != "amx":
            bar = LINEAR_BARS["bf16"]  # inputs of 16 bits, and no kernel but AMX rounds weights again
        assert relative_error(grafted(x), expected(module, grafted, x)) <= bar * (1.5 if tokens == 1 else 1)
    assert kwargs["format"] in repr(grafted)
