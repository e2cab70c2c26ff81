"""Checkpoints in fp8 (DeepSeek-V3's layout) and mxfp4 (gpt-oss's): their own bytes in memory, or other formats from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig

from numagraft import load_and_optimize, plan
from numagraft.checkpoints import open_checkpoint, quantised
from numagraft.errors import CheckpointError
from numagraft.operators.experts import Experts
from numagraft.operators.linear import Linear
from tests import models
from tests.operators.grafting import relative_error, unpacked_linear, with_unpacked_experts

TOKENS = torch.tensor([[1, 5, 9, 30, 77, 3]])
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def deepseek() -> DeepseekV3Config:
    """Sizes that fill blocks of 128 and that do not."""
    attention = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    sizes = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 256, "first_k_dense_replace": 1}
    return DeepseekV3Config(**(models._BASE | attention | experts | sizes | {"num_key_value_heads": 4}))


def gpt_oss() -> GptOssConfig:
    sizes = {"hidden_size": 96, "intermediate_size": 160}
    return GptOssConfig(**(models._BASE | sizes), num_local_experts=4, num_experts_per_tok=2, head_dim=16)


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales per block of 128 x 128, and the values that they stand for."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    values = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            values[block] = codes[block].float() * scales[i, j]
    return codes, scales, values


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [experts, in, out]: blocks [experts, out, groups, 16], exponents, and the values [experts, in, out]."""
    rows = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = torch.floor(torch.log2(rows.abs().amax(-1))) - 2
    scaled = rows / torch.exp2(exponents).unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - E2M1).abs().argmin(-1)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    values = (E2M1[codes] * torch.exp2(exponents).unsqueeze(-1)).flatten(2).transpose(1, 2)
    return blocks, (exponents + 127).to(torch.uint8), values.contiguous()


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None], **quantisation: Any) -> None:
    """Changes a checkpoint's tensors, and its quantization_config where one is given."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    if quantisation:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


def quantise_fp8(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight") or "_proj_with_mqa" in name or "_b_proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = to_fp8(tensors[name].float())


def quantise_mxfp4(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], _ = to_mxfp4(tensors.pop(name).float())


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "fp8": (deepseek, quantise_fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "mxfp4": (gpt_oss, quantise_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(family: str, tmp_path: Path) -> Path:
    config, quantise, quantisation = FAMILIES[family]
    path = models.save(models.build(config(), dtype=torch.bfloat16), tmp_path / family)
    rewrite(path, quantise, **quantisation)
    return path


def reference(path: Path) -> Any:
    """The model of the values that the codes stand for, by this file's own arithmetic, in float32."""
    config = FAMILIES[path.name][0]
    plain = models.save(models.build(config(), dtype=torch.bfloat16), path.parent / "plain")

    def values(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            tensors[name] = tensor.float()
            if path.name == "fp8" and f"{name}_scale_inv" in load_file(path / "model.safetensors"):
                tensors[name] = to_fp8(tensor.float())[2]
            if path.name == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = to_mxfp4(tensor.float())[2]

    rewrite(plain, values)
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()


def operators(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear | Experts)}


@torch.no_grad()
def test_own_bytes_are_kept_to_the_bit(saved: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a format named: what is stored in fp8 or mxfp4 stays so, and stands for the same values."""
    expected = reference(saved)
    for cls in (quantised.Fp8Tensor, quantised.Mxfp4Tensor):  # nothing is dequantised on the way
        monkeypatch.setattr(cls, "read", lambda self, out=None: pytest.fail(f"{self.name} was dequantised"))
        monkeypatch.setattr(cls, "read_part", lambda self, index, out=None: pytest.fail(f"{self.name} was dequantised"))
    grafted = load_and_optimize(saved, dtype=torch.float32)
    made = plan(saved, dtype=torch.float32)
    formats = {each.name: each.params.format for each in made.modules if each.params is not None}
    kept = 0
    for name, operator in operators(grafted).items():
        assert operator.params.format == formats[name]
        if formats[name] != family:
            assert family == "mxfp4" or name == "lm_head", name
            continue
        kept += 1
        module = expected.get_submodule(name)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        if isinstance(operator, Linear):
            assert torch.equal(unpacked_linear(operator), module.weight), name
        else:
            after = with_unpacked_experts(module, operator).state_dict()
            assert all(torch.equal(after[key], value) for key, value in before.items()), name
    assert kept == (2 if family == "mxfp4" else sum(format == "fp8" for format in formats.values())) > 1
    assert relative_error(grafted(TOKENS).logits, expected(TOKENS).logits) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8", "mxfp4"])
def test_other_formats_from_the_values(saved: Path, format: str) -> None:
    expected = reference(saved)
    grafted = load_and_optimize(saved, dtype=torch.float32, overrides=[f"vars.format={format}"])
    bars = {"bf16": 2e-3, "int8": 1.2e-2, "int4": 0.11, "fp8": 0.04, "mxfp4": 0.16}
    for name, operator in operators(grafted).items():
        if name == "lm_head":
            continue
        assert operator.params.format == format
        module = expected.get_submodule(name)
        if isinstance(operator, Linear):
            assert relative_error(unpacked_linear(operator), module.weight) <= bars[format], name
        else:
            before = module.gate_up_proj.clone()
            assert relative_error(with_unpacked_experts(module, operator).gate_up_proj, before) <= bars[format], name


@torch.no_grad()
def test_what_no_rule_takes_is_dequantised(saved: Path) -> None:
    rules = {
        "schema": 1,
        "rules": [{"id": "head", "match": {"role": "lm_head"}, "replace": {"class": "linear", "kwargs": {"format": "bf16"}}}],
    }
    expected, kept = reference(saved), load_and_optimize(saved, rules=rules, dtype=torch.float32)
    # what transformers saves in fp32 whatever the model's dtype: from 5.24 the router's gate of DeepSeek-V3
    in_fp32 = tuple(getattr(expected, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in kept.named_parameters():
        whole = expected.get_parameter(name)
        # all else through the model's dtype in the checkpoint, bfloat16
        wanted = whole if any(key in name for key in in_fp32) else whole.bfloat16().float()
        assert torch.equal(parameter, wanted) or "norm" in name, name


def test_planned_bytes_are_those_of_the_checkpoint(saved: Path, family: str) -> None:
    made = plan(saved)
    loaded = load_and_optimize(saved)
    for each in made.modules:
        if each.placement is not None:
            placed = sum(each.node_bytes.values())
            assert placed == loaded.get_submodule(each.name).grafted_bytes(), each.name
    with open_checkpoint(saved) as source:
        assert source.source_bytes < 0.75 * sum(p.numel() * 2 for p in loaded.parameters()) + 2 * sum(
            module.grafted_numel() for module in operators(loaded).values()
        )


def test_progress_counts_codes_and_scales(saved: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    load_and_optimize(saved, progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in load_file(saved / "model.safetensors").values())
    assert calls[-1][:2] == (total, total)


def drop(*endings: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(("_scale_inv", "_scales"))]:
        tensors[name] = tensors[name][..., :-1].contiguous() if tensors[name].shape[-1] > 1 else tensors[name].reshape(-1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop("_scale_inv", "_scales"), r"beside it"),
        (drop("experts.gate_up_proj_blocks", "experts.0.gate_proj.weight", "experts.1.up_proj.weight"), "belongs to no quantised weight"),
        (reshape, r"has the shape .*, expected "),
    ],
    ids=["no scales", "no codes", "other scales"],
)
def test_codes_without_scales_and_scales_without_codes(saved: Path, change: Any, found: str) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=found) as caught:
        open_checkpoint(saved)
    assert len(caught.value.problems) > 1  # all at once
    with pytest.raises(CheckpointError, match=found):
        plan(saved)


def test_layouts_that_are_not_supported(tmp_path: Path) -> None:
    path = models.save(models.build(deepseek(), dtype=torch.bfloat16), tmp_path / "fp8")
    rewrite(path, quantise_fp8, quant_method="fp8", fmt="e5m2", weight_block_size=[64, 64])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "found blocks of [64, 64], expected [128, 128]" in str(caught.value)
    assert "found 'e5m2', expected 'e4m3'" in str(caught.value)


def test_a_dequantised_checkpoint_whose_config_was_left(tmp_path: Path) -> None:
    """DeepSeek's own conversion to bf16 leaves quantization_config behind: the tensors say what they are."""
    path = models.save(models.build(deepseek(), dtype=torch.bfloat16), tmp_path / "fp8")
    rewrite(path, lambda tensors: None, quant_method="fp8", weight_block_size=[128, 128])
    assert {each.params.format for each in plan(path).modules if each.params is not None} == {"int8"}
