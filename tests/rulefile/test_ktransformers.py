"""Old rule files become ours: they load, plan, and what has no counterpart is named."""

from __future__ import annotations

import re

import pytest

from numagraft.errors import RuleError
from numagraft.platform import Platform
from numagraft.rulefile import load_rules
from numagraft.rulefile.ktransformers import convert, convert_flags, convert_tensor_overrides, whole

# in the shape of their files for DeepSeek-V3 on two GPUs
OLD = r"""- match:
    name: "^model.embed_tokens"
  replace:
    class: "default"
    kwargs:
      generate_device: "cpu"
      prefill_device: "cpu"
# === linears of the first half ===
- match:
    name: "^model\\.layers\\.([0-9]|[12][0-9])\\.(?!self_attn\\.kv_b_proj).*$"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs:
      generate_device: "cuda:0"
      prefill_device: "cuda:0"
      generate_op: "KLinearMarlin"
      prefill_op: "KLinearTorch"
- match:
    name: "^model\\.layers\\..*\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      prefill_device: "cuda:1"
      prefill_op: "KExpertsTorch"
      generate_device: "cpu"
      generate_op: "KExpertsCPU"
      backend: "AMXInt8"
      out_device: "cuda:1"
      surprise: 5
  recursive: False
- match:
    class: ktransformers.models.modeling_deepseek_v3.DeepseekV3MoE
  replace:
    class: ktransformers.operators.experts.KDeepseekV3MoE
    kwargs:
      generate_device: "cuda:0"
      prefill_device: "cuda:0"
- match:
    name: "^model$"
  replace:
    class: "ktransformers.operators.models.KDeepseekV2Model"
    kwargs:
      per_layer_prefill_intput_threshold: 0
      transfer_map:
        30: "cuda:1"
- match:
    name: "^lm_head"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs:
      generate_device: "cpu"
      prefill_device: "cpu"
      generate_op: "KLinearCPUInfer"
"""


def test_a_file_is_converted_and_loads(tmp_path):
    made = convert(OLD, file="old.yaml")
    path = tmp_path / "new.yaml"
    path.write_text(made.text)
    rules = load_rules(path, platform=Platform.virtual(1))
    assert made.rules == 6 and "# === linears of the first half ===" in made.text
    by_id = {rule.id: rule for rule in rules.rules}
    assert by_id["kt-1"].match.name == "model.embed_tokens.*"
    assert (by_id["kt-1"].replace.operator, by_id["kt-1"].replace.device) == ("default", "cpu")
    assert (by_id["kt-2"].replace.operator, by_id["kt-2"].replace.device) == ("torch", "cuda:0")
    experts = by_id["kt-3"]
    assert (experts.replace.operator, experts.replace.device, experts.recursive) == ("experts", "cpu", False)
    assert experts.replace.kwargs == {"format": "int8"}
    assert by_id["kt-4"].match.class_name == "DeepseekV3MoE"
    assert by_id["kt-6"].replace.operator == "linear"
    notes = "\n".join(made.notes)
    for piece in (
        "old.yaml:9:3: KLinearMarlin on cuda:0 becomes torch's own linear there, unquantised",
        "decodes on cpu and prefills on cuda:1",
        "the kwarg 'surprise' is unknown",
        "out_device cuda:1 is not needed",
        "is a whole mixture block",
        "transfer_map {'30': 'cuda:1'} follows from the devices of the layers",
    ):
        assert piece in notes, notes


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("^model.embed_tokens", "model.embed_tokens"),
        (r"^model\.layers\..*\.mlp\.experts$", "model.layers.3.mlp.experts"),
        (r"experts$", "model.layers.3.mlp.experts"),
        (r"q_proj|k_proj", "model.layers.3.self_attn.q_proj"),
        (r"^a|b$", "zzz.b"),
        (r"mlp", "model.layers.3.mlp.experts"),
        (r"self_attn\.(q|k)_proj$", "model.layers.3.self_attn.k_proj"),
        ("lm_head", "model.norm"),
        ("^layers", "model.layers"),
        ("mlp$", "model.mlp.experts"),
    ],
)
def test_searched_patterns_become_whole_ones(pattern, name):
    assert bool(re.fullmatch(whole(pattern), name)) == bool(re.search(pattern, name))


def test_what_is_no_list_is_refused():
    with pytest.raises(RuleError, match="a bare list of match/replace"):
        convert("schema: 1\n", file="x")
    with pytest.raises(RuleError, match="x:2:3: found no match/replace"):
        convert("- {match: {name: a}, replace: {class: default}}\n- {a: 1}\n", file="x")


def test_tensor_overrides(tmp_path):
    made = convert_tensor_overrides([r"blk\.(3|4|1[0-5])\.ffn_.*_exps=CPU", r"blk\.\d+\.attn.*=CUDA1,token_embd=CPU", "x=ROCm0"])
    path = tmp_path / "new.yaml"
    path.write_text(made.text)
    rules = load_rules(path, platform=Platform.virtual(1)).rules
    assert [(rule.match.role, rule.replace.operator, rule.replace.device) for rule in rules] == [
        ("experts", "experts", "cpu"),
        ("attention", "default", "cuda:1"),
    ]
    assert sorted(rules[0].match.layers) == [3, 4, 10, 11, 12, 13, 14, 15]
    assert len(made.notes) == 2 and "token_embd" in made.notes[0] and "ROCm0" in made.notes[1]


def test_flags(tmp_path):
    made = convert_flags(["--kt-method", "AMXINT4", "--kt-numa-nodes", "0,1", "--kt-cpuinfer", "64", "--kt-num-gpu-experts=2"])
    path = tmp_path / "new.yaml"
    path.write_text(made.text)
    rules = load_rules(path, platform=Platform.virtual(2))
    assert rules.vars["format"] == "int4" and rules.runtime.nodes == (0, 1)
    assert len(made.notes) == 2
