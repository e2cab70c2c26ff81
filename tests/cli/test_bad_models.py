"""`numagraft run` and `plan` on models that cannot be loaded: one paragraph on standard error, an exit code, no traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from numagraft.cli import main
from tests import models


def cut_gguf(model: Path, gguf: Path) -> Path:
    (model / "cut.gguf").write_bytes(gguf.read_bytes()[:40_000_000])
    return model / "cut.gguf"


def without_shard(model: Path, _: Path) -> Path:
    sorted(model.glob("*.safetensors"))[-1].unlink()
    return model


def wrong_shape(model: Path, _: Path) -> Path:
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.ones(3)
            save_file(tensors, file)
    return model


def another_model(model: Path, _: Path) -> Path:
    (model / "config.json").write_text(models.qwen3_moe(architectures=["Qwen3MoeForCausalLM"]).to_json_string())
    return model


def quantised(model: Path, _: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return model


BAD: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "a truncated GGUF file": (cut_gguf, "truncated; copy or download it again"),
    "a missing shard": (without_shard, "download the missing files"),
    "a tensor of the wrong shape": (wrong_shape, "[3] in the checkpoint; the model needs [64]"),
    "a checkpoint of another model": (another_model, "check that both come from the same place"),
    "a checkpoint quantised by others": (quantised, "give the unquantised"),
    "nothing": (lambda model, _: model / "nowhere", "does not exist"),
}


class Letters:
    """A tokenizer, which is looked at before any weight."""

    chat_template = None

    def __call__(self, prompt: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 64 for letter in prompt]])}


@pytest.mark.parametrize("what", BAD)
def test_run_refuses_in_one_paragraph(
    what: str, tmp_path: Path, smollm2_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, remedy = BAD[what]
    model = spoil(models.save(models.build(models.llama()), tmp_path / "model", max_shard_size="100KB"), smollm2_gguf)
    capsys.readouterr()
    monkeypatch.setattr("numagraft.checkpoints.load_tokenizer", lambda model: Letters())
    monkeypatch.setattr(sys, "argv", ["numagraft", "run", str(model), "--prompt", "hello", "--quiet"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.startswith("numagraft: ") and remedy in printed.err and str(model) in printed.err
    assert "Traceback" not in printed.err and len(printed.err) < 3000
    assert printed.out == ""


def test_a_tokenizer_without_files_is_told_before_any_weight_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes an empty tokenizer for some model types, and a prompt of no tokens fails deep inside the model."""
    model = models.save(models.build(models.qwen3_moe()), tmp_path / "model")
    monkeypatch.setattr("numagraft.loading.Load.take", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(sys, "argv", ["numagraft", "run", str(model), "--prompt", "hello", "--quiet"])
    with pytest.raises(SystemExit) as caught:
        main.run()
    printed = capsys.readouterr()
    assert caught.value.code == 2 and "put tokenizer.json and tokenizer_config.json beside the weights" in printed.err
