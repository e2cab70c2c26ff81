from __future__ import annotations

import re

import pytest
import torch
from families import EXPERTS, HIDDEN, INTERMEDIATE, build, expert_classes
from torch import nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from numagraft.contract import Accepted, Rejected
from numagraft.operators.expert_contract import expert_shape
from numagraft.operators.experts import Experts
from numagraft.operators.gates import recognise_activation, recognise_gate
from numagraft.operators.params import PackedParams

# Every class that is not simply accepted with silu, and why. A class of a new transformers that is missing here and not
# accepted fails the test: look at it, then write its row.
VERDICTS = {
    "BeamExperts": "`_apply_gate` of its own",
    "DbrxExpertGLU": r"forward\(x, expert_w1, expert_v1, expert_w2\) is not the shared expert contract",
    "DbrxExperts": "forward of its own",
    "DeepseekV4Experts": "`_apply_gate` of its own",
    "DiffusionGemmaTextExperts": Accepted("gate gelu_tanh"),
    "Gemma4TextExperts": Accepted("gate gelu_tanh"),
    "Glm5NextTextExperts": "`_apply_gate` of its own",
    "GptOssExperts": Accepted("gate clamped_swiglu"),
    "HYV4Experts": "`_apply_gate` of its own",
    "Inkling2Experts": "`_apply_gate` of its own",
    "Inkling2LoopExperts": "`_apply_gate` of its own",
    "HYV4VLExperts": "`_apply_gate` of its own",
    "JetMoeParallelExperts": r"forward\(inputs, expert_size\) is not",
    "Llama4TextExperts": r"forward\(hidden_states\) is not",
    "LongcatFlashExperts": "forward of its own",
    "MiniMaxM3VLExperts": Accepted("gate clamped_swiglu"),
    "MuseSparkExperts": "norm after each expert",
    "NemotronHExperts": "has no gate",
    "NllbMoeExperts": r"forward\(hidden_states, router_mask, router_probs\) is not",
    "OpenAIPrivacyFilterExperts": Accepted("gate clamped_swiglu"),
    "Step3p7Experts": "forward of its own",
    "SwitchTransformersExperts": r"forward\(hidden_states, selected_experts, routing_weights\) is not",
}
#: classes that transformers has from 5.24 on
FROM_5_24 = {"HYV4VLExperts", "Inkling2LoopExperts"}


def config(**changes) -> MixtralConfig:
    sizes = {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    return MixtralConfig(**(sizes | changes))


def mixtral(**changes) -> MixtralExperts:
    with torch.device("meta"):
        return MixtralExperts(config(**changes))


@pytest.mark.parametrize("name", sorted(expert_classes()))
def test_the_verdict_on_every_family(name):
    module = build(expert_classes()[name])
    assert module is not None, f"{name}: no configuration of its family builds it; teach families.build"
    verdict = Experts.check(module, PackedParams(), None)
    expected = VERDICTS.get(name, Accepted("gate silu"))
    if isinstance(expected, Accepted):
        assert verdict == expected
        shape = expert_shape(module)
        assert (shape.experts, shape.hidden, shape.intermediate) == (EXPERTS, HIDDEN, INTERMEDIATE)
    else:
        assert isinstance(verdict, Rejected) and name in verdict.reason
        assert re.search(expected, verdict.reason), verdict.reason


def test_no_verdict_is_of_a_class_that_is_gone():
    assert set(VERDICTS) - FROM_5_24 <= set(expert_classes())


def test_gpt_oss_shape():
    shape = expert_shape(build(GptOssExperts))
    assert shape.transposed and shape.has_bias and shape.gate.interleaved
    assert (shape.gate.kind, shape.gate.alpha, shape.gate.limit) == ("clamped_swiglu", 1.702, 7.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "_is_expert_parallel", True), "expert parallelism"),
        (lambda m: setattr(m, "has_gate", False), "no gate"),
        (lambda m: setattr(m, "has_post_expert_norm", True), "norm after"),
        (lambda m: setattr(m, "has_bias", True), "no parameter down_proj_bias, gate_up_proj_bias"),
        (lambda m: setattr(m, "is_concatenated", False), "interleaves gate and up"),
        (lambda m: setattr(m, "is_transposed", True), r"down_proj has the shape \[5, 72, 40\], expected \[5, 36, 80\]"),
        (lambda m: setattr(m, "act_fn", ACT2FN["relu2"]), "activation ReLUSquaredActivation; known are"),
        (lambda m: setattr(m, "num_experts", 4), "num_experts is 4, the weights hold 5"),
        (lambda m: setattr(m, "forward", lambda *a: None), "replaced on the instance"),
        (lambda m: setattr(m, "_apply_gate", lambda g: g), "no `_apply_gate` of its class"),
        (lambda m: m.register_forward_hook(lambda *a: None), "hooks"),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), "submodule extra"),
        (lambda m: setattr(m, "extra", nn.Parameter(torch.ones(2))), "also holds extra"),
        (lambda m: m.register_buffer("scale", torch.ones(2)), "also holds scale"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(torch.empty(5, 40, device="meta"))), r"shape \[5, 40\]"),
        (
            lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)),
            "down_proj is float8_e4m3fn",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_rejected(change, reason):
    module = mixtral()
    assert Experts.check(module, PackedParams(), None) == Accepted("gate silu")
    change(module)
    verdict = Experts.check(module, PackedParams(), None)
    assert isinstance(verdict, Rejected)
    assert re.search(reason, verdict.reason), verdict.reason


def test_a_subclass_with_its_own_forward_or_gate_is_rejected():
    class Forward(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    @use_experts_implementation
    class Gate(MixtralExperts):
        def _apply_gate(self, gate_up):
            return gate_up

    class Plain(MixtralExperts):
        pass

    with torch.device("meta"):
        verdicts = [Experts.check(cls(config()), PackedParams(), None) for cls in (Forward, Gate, Plain)]
    assert "forward of its own" in verdicts[0].reason
    assert "`_apply_gate` of its own" in verdicts[1].reason
    assert isinstance(verdicts[2], Accepted)


@pytest.mark.parametrize("strange", [nn.Linear(2, 2), nn.ReLU(), nn.ModuleList(), nn.Module(), nn.LSTM(2, 2)])
def test_strange_modules_are_rejected_without_an_exception(strange):
    assert isinstance(Experts.check(strange, PackedParams(), None), Rejected)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_a_recognised_activation_computes_what_its_name_says(name):
    """Every activation of transformers: recognised ones agree with the native formula, the others are None."""
    known = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu"}
    known |= dict.fromkeys(
        ("gelu_fast", "gelu_new", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"
    )
    activation = ACT2FN[name]
    assert recognise_activation(activation) == known.get(name)
    if name in known:
        x = torch.linspace(-8, 8, 201)
        formula = {
            "silu": nn.functional.silu,
            "relu": nn.functional.relu,
            "gelu": nn.functional.gelu,
            "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        }[known[name]]
        torch.testing.assert_close(activation(x), formula(x), rtol=1e-5, atol=1e-5)


def test_functions_and_torch_modules_are_activations_too():
    assert recognise_activation(nn.functional.silu) == "silu"
    assert recognise_activation(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert recognise_activation(nn.GELU()) == "gelu"
    assert recognise_activation(lambda x: x) is None
    assert recognise_activation({}) is None
    assert recognise_activation(type("SiLUActivation", (nn.SiLU,), {})()) is None


def test_a_clamped_gate_without_numbers_is_not_known():
    module = build(GptOssExperts)
    module.alpha = None
    assert "no numbers in alpha and limit" in recognise_gate(module)
    module.alpha, module.is_concatenated = 1.0, True
    assert "its gate says otherwise" in recognise_gate(module)
