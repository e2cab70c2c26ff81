"""The random checkpoints load as what they say they are."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.make_checkpoint import main, with_layers_for  # noqa: E402
from benchmarks.random_checkpoint import ARCHITECTURES, Shape, checkpoint_bytes, shards, tensor_bytes  # noqa: E402

TINY = shlex.split("--layers 2 --hidden 64 --intermediate 96 --heads 4 --kv-heads 2 --head-dim 16 --vocab 128")
MOE = shlex.split("--moe-intermediate 32 --experts 4 --topk 2")


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_a_written_checkpoint_loads_without_missing_or_unexpected_weights(arch, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    sizes = TINY if arch == "llama" else TINY + MOE
    assert main([str(tmp_path / "out"), "--arch", arch, *sizes, "--shard-gib", "0.0001", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["files"] > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == result["parameters"]
    logits = model(torch.arange(5)[None]).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_a_tensor_that_the_index_lacks_is_noticed(tmp_path, capsys):
    """Negative control of the test above: the loader does report what is not there."""
    from transformers import AutoModelForCausalLM

    assert main([str(tmp_path), "--arch", "llama", *TINY, "--json"]) == 0
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.no_proj"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.mlp.up_proj.weight"}


def test_the_random_weights_differ_from_expert_to_expert(tmp_path, capsys):
    from safetensors import safe_open

    assert main([str(tmp_path), *TINY, *MOE, "--json"]) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        first, second = (file.get_tensor(f"model.layers.0.mlp.experts.{e}.up_proj.weight").float() for e in (0, 1))
        norm = file.get_tensor("model.norm.weight")
    assert not first.equal(second)
    assert 0.015 < first.std() < 0.025
    assert (norm == 1).all()


def test_published_shapes_give_published_sizes():
    qwen = ARCHITECTURES["qwen3_moe"].shape
    assert checkpoint_bytes("qwen3_moe", qwen) == 30_532_122_624 * 2  # parameters on the model card: 30.5 B
    assert with_layers_for("qwen3_moe", qwen, gib=12).layers == 10
    assert checkpoint_bytes("qwen3_moe", replace(qwen, layers=9)) < 12 * 2**30


def test_shards_hold_every_tensor_once_and_stay_below_their_limit():
    listed = [(f"t{i}", (size,)) for i, size in enumerate([3, 3, 3, 50, 1, 1])]
    parts = shards(listed, 12)
    assert [tensor for part in parts for tensor in part] == listed
    assert all(len(part) == 1 or sum(tensor_bytes(d) for _, d in part) <= 12 for part in parts)


def test_every_impossible_size_is_named_at_once(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(out), "--topk", "9", "--experts", "8", "--heads", "3", "--kv-heads", "2", "--vocab", "0"]) == 2
    message = capsys.readouterr().err
    assert "--topk" in message and "--heads" in message and "--vocab" in message
    assert not out.exists()


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main([str(tmp_path), *TINY, *MOE]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert "not empty" in capsys.readouterr().err


def test_the_command_prints_json_last(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.make_checkpoint", "--arch", "llama", *TINY, str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout.splitlines()[-1])["arch"] == "llama"


def test_shape_problems_are_empty_for_the_published_models():
    for architecture in ARCHITECTURES.values():
        assert architecture.shape.problems() == []
    assert Shape(1, 1, 1, 0, 0, 0, 1, 1, 3, 1).problems()
