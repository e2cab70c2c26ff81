from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from numagraft.contract import Accepted
from numagraft.operators.linear import Linear
from numagraft.operators.parents import computes_with


@pytest.mark.parametrize(
    ("family", "parent", "attribute", "method"),
    [
        ("longcat_flash", "LongcatFlashTopkRouter", "classifier", "forward"),
        ("jamba", "JambaMambaMixer", "dt_proj", None),
        ("mamba", "MambaMixer", "x_proj", None),
        ("mamba2", "Mamba2Mixer", "out_proj", None),
        ("falcon_mamba", "FalconMambaMixer", "dt_proj", None),
        ("bamba", "BambaMixer", "out_proj", None),
        ("falcon_h1", "FalconH1Mixer", "out_proj", None),
        ("granitemoehybrid", "GraniteMoeHybridMambaLayer", "out_proj", None),
        ("nemotron_h", "NemotronHMamba2Mixer", "out_proj", None),
        ("zamba2", "Zamba2MambaMixer", "out_proj", None),
        ("wavlm", "WavLMAttention", "q_proj", None),
        ("gemma4_assistant", "Gemma4AssistantForCausalLM", "lm_head", "forward"),
    ],
)
def test_families_that_compute_with_a_childs_weight(family, parent, attribute, method):
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), parent)
    where = computes_with(cls.__new__(cls), attribute)
    assert where is not None and where.startswith(f"{parent}.")
    assert method is None or where == f"{parent}.{method}"


@pytest.mark.parametrize(
    ("family", "parent", "attribute"),
    [
        ("llama", "LlamaMLP", "gate_proj"),
        ("llama", "LlamaAttention", "q_proj"),
        ("llama", "LlamaForCausalLM", "lm_head"),
        ("t5", "T5DenseActDense", "wo"),  # asks for its dtype only
        ("mamba", "MambaForCausalLM", "lm_head"),
        ("hunyuan_v1_moe", "HunYuanMoEV1Gate", "wg"),
        ("mamba", "MambaMixer", "in_proj"),  # a sibling of one that is computed with
    ],
)
def test_families_that_only_call_it_or_peek(family, parent, attribute):
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), parent)
    assert computes_with(cls.__new__(cls), attribute) is None


def test_multihead_attention_uses_its_projection_itself():
    attention = nn.MultiheadAttention(8, 2)
    verdict = Linear.check_within(attention, "out_proj")
    assert "MultiheadAttention.forward computes with out_proj's weight itself" in verdict.reason


def test_a_class_without_source_is_taken_at_its_word():
    made = type("Made", (nn.Module,), {"forward": lambda self, x: x})()
    assert Linear.check_within(made, "child") == Accepted()


def test_an_inherited_method_counts():
    class Base(nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.child.weight)

    class Derived(Base):
        pass

    assert computes_with(Derived(), "child") == "Base.forward"


def test_fused_expert_weights_count_as_well():
    class Block(nn.Module):
        def forward(self, x):
            return x @ self.experts.gate_up_proj[0] + self.experts.num_experts

    assert computes_with(Block(), "experts") == "Block.forward"
