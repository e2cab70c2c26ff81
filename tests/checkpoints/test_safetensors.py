"""Safetensors files: what is read is what was written, and every kind of damage is told before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from numagraft.checkpoints import open_checkpoint
from numagraft.checkpoints.files import UncachedFile
from numagraft.checkpoints.safetensors import read_header
from numagraft.errors import CheckpointError
from tests import models

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.build(models.llama()), tmp_path_factory.mktemp("llama"), max_shard_size="100KB")


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, shapes, dtype) -> None:
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    written = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, shape in enumerate(shapes)}
    save_file(written, path)
    read = read_header(UncachedFile(path))
    assert read.keys() == written.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor.read(), written[name]) and tensor.dtype == dtype
        if tensor.shape and tensor.shape[0]:
            last = tensor.shape[0] - 1
            assert torch.equal(tensor.read_part(last), written[name][last])
            out = torch.empty_like(written[name][last])
            assert tensor.read_part(last, out) is out and torch.equal(out, written[name][last])


def test_shards_are_one_mapping(saved: Path) -> None:
    model = models.build(models.llama())
    with open_checkpoint(saved) as source:
        assert set(source) == set(model.state_dict())
        assert len(list(saved.glob("*.safetensors"))) > 1
        for name, tensor in model.state_dict().items():
            assert torch.equal(source[name].read(), tensor)


def test_pages_that_were_read_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3 << 20), "b": torch.randn(5 << 20), "c": torch.randn(16 << 20)}, path)
    with path.open("r+b") as file:
        os.fsync(file.fileno())  # the kernel keeps pages that are not on disk yet
        file.read()
    read = read_header(file := UncachedFile(path))
    before = file.cached_bytes()
    if before is None:
        pytest.skip("this kernel does not answer mincore")
    assert before > 90 << 20
    for tensor in read.values():
        tensor.read()
    after = file.cached_bytes()
    file.close()
    if after == before:
        pytest.skip("this file system keeps pages that were read, whatever it is told")
    assert after < before / 4


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def rewrite_header(path: Path, header: object) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


DAMAGE = {
    "a missing shard": (lambda d: first_shard(d).unlink(), "lacks 1 of the"),
    "a truncated shard": (lambda d: cut(first_shard(d), first_shard(d).stat().st_size - 100), "truncated or damaged"),
    "a shard cut in its header": (lambda d: cut(first_shard(d), 60), "truncated or not a safetensors file"),
    "an empty shard": (lambda d: cut(first_shard(d), 0), "too short"),
    "a header that is no JSON": (lambda d: rewrite_header(first_shard(d), b"{nonsense"), "no readable header"),
    "a header that is a list": (lambda d: rewrite_header(first_shard(d), []), "no mapping of names"),
    "a negative shape": (
        lambda d: rewrite_header(first_shard(d), {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        "no sizes",
    ),
    "offsets that do not fit the shape": (
        lambda d: rewrite_header(first_shard(d), {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}),
        "needs 12",
    ),
    "an unknown dtype": (
        lambda d: rewrite_header(first_shard(d), {"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}),
        "'F3'",
    ),
    "an entry that is no mapping": (lambda d: rewrite_header(first_shard(d), {"a": 3}), "damaged"),
    "an index of another checkpoint": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"no.such.name": first_shard(d).name}})
        ),
        "are in no shard",
    ),
    "an index that points elsewhere": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../../etc/passwd"}})
        ),
        "outside its directory",
    ),
    "an index that is no JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("["),
        "not a readable index",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "a config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "an unknown model type": (
        lambda d: (d / "config.json").write_text('{"model_type": "no_such_family"}'),
        "no_such_family",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(checkpoint: Path, damage: str) -> None:
    open_checkpoint(checkpoint).close()  # whole before
    spoil, message = DAMAGE[damage]
    spoil(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert message in str(caught.value)
    assert str(checkpoint) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        for path in checkpoint.glob("*.safetensors"):
            cut(path, 2000)
        with pytest.raises(CheckpointError, match="truncated"):
            for tensor in source.values():
                tensor.read()


def test_files_that_are_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="give its directory"):
        open_checkpoint(first_shard(checkpoint))
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"PyTorch \.bin files"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "numagraft"])
def test_a_checkpoint_quantised_by_others_is_refused(checkpoint: Path, method: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"already quantised \\({method}\\)"):
        open_checkpoint(checkpoint)
