"""GGUF files: the same values as transformers reads, one tensor at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numagraft.checkpoints import load_tokenizer, open_checkpoint
from numagraft.checkpoints.files import UncachedFile
from numagraft.checkpoints.gguf import GgufCheckpoint, GgufTensor, MergedExperts
from numagraft.checkpoints.gguf_header import Stored, read_header
from numagraft.errors import CheckpointError
from tests import models

KINDS = gguf.GGMLQuantizationType


def skeleton_of(config: Any) -> Any:
    with torch.device("meta"):
        return models.build(config)


def write(path: Path, architecture: str, config: Any, *, kind: KINDS, spoil: str = "") -> Path:
    """A GGUF file with random values under every name that the model of `config` needs."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    skeleton = skeleton_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    random = np.random.default_rng(0)
    for stored, name in get_gguf_hf_weights_map(skeleton, processor).items():
        shape = shapes[name]
        if "_exps" in stored:
            stored = stored if stored.endswith(".weight") else f"{stored}.weight"
            if "ffn_down" not in stored:
                shape = (shape[0], shape[1] // 2, shape[2])
            if spoil == "half" and "ffn_up_exps" in stored:
                continue
        values = random.standard_normal(shape, dtype=np.float32)
        use = kind if len(shape) > 1 and shape[-1] % 32 == 0 else KINDS.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CASES = [
    (architecture, kind)
    for architecture in ("llama", "qwen3moe")
    for kind in (KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1)
]


def config_for(architecture: str) -> Any:
    return models.llama() if architecture == "llama" else models.qwen3_moe(moe_intermediate_size=32)


class Permuting:
    """A processor that moves and changes values, as those of transformers do."""

    def process(self, *, weights: np.ndarray, name: str) -> Any:
        return SimpleNamespace(weights=weights - 1 if weights.ndim == 1 else weights[::-1].T)


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0])
@pytest.mark.parametrize("shape", [(64,), (32, 64)])
def test_processing_is_done_on_values(tmp_path: Path, kind: KINDS, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32)
    data = gguf.quants.quantize(values, kind).tobytes()
    (tmp_path / "f").write_bytes(data)
    stored = Stored("a", kind, shape, 0, len(data))
    file = UncachedFile(tmp_path / "f")
    tensor = GgufTensor("a", stored, file, GgufCheckpoint._process(Permuting(), "a"))
    plain = GgufTensor("a", stored, file, None).read()
    expected = plain.float() - 1 if len(shape) == 1 else plain.float().flip(0).T
    assert tensor.shape == expected.shape
    assert torch.equal(tensor.read().float(), expected)
    assert GgufCheckpoint._process(Permuting(), "output.weight") is None


@pytest.mark.parametrize("architecture, kind", CASES)
def test_values_are_those_that_transformers_reads(tmp_path: Path, architecture: str, kind: KINDS) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write(tmp_path / "model.gguf", architecture, config_for(architecture), kind=kind)
    with open_checkpoint(path) as source:
        skeleton = skeleton_of(source.config)
        source.bind(skeleton)
        expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton)["tensors"]
        assert set(source) == set(expected) == set(skeleton.state_dict())
        for name, tensor in source.items():
            values = tensor.read()
            assert tensor.shape == values.shape == skeleton.state_dict()[name].shape
            assert torch.equal(values.float(), expected[name].float())
            assert torch.equal(tensor.read_part(1), values[1])
            assert torch.equal(tensor.read(torch.empty_like(values)), values)
        assert source.dtype == {KINDS.F16: torch.float16, KINDS.BF16: torch.bfloat16}.get(kind, torch.float32)
        assert any(isinstance(tensor, MergedExperts) for tensor in source.values()) == (architecture == "qwen3moe")


def test_a_missing_half_of_the_experts(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "qwen3moe", config_for("qwen3moe"), kind=KINDS.F32, spoil="half")
    with open_checkpoint(path) as source, pytest.raises(CheckpointError, match="only its gate half"):
        source.bind(skeleton_of(source.config))


@pytest.mark.parametrize("keep", [0, 3, 20, 4000, -40])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "m.gguf", "llama", config_for("llama"), kind=KINDS.Q8_0)
    open_checkpoint(path).close()
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf") as caught:
        open_checkpoint(path)
    assert "truncated" in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_header_is_told_or_harmless(gguf_bytes: tuple[Path, bytes], data: st.DataObject) -> None:
    """Bytes changed or cut anywhere: a header, or a CheckpointError; nothing else, and no wild allocation."""
    path, whole = gguf_bytes
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if changed:
            at = data.draw(st.integers(0, min(len(changed), 1500) - 1))
            changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert all(each.offset + each.bytes <= len(changed) for each in header.tensors)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = write(tmp_path_factory.mktemp("damaged") / "m.gguf", "llama", config_for("llama"), kind=KINDS.Q8_0)
    return path, path.read_bytes()


def test_the_header_is_that_of_the_gguf_package(smollm2_gguf: Path) -> None:
    header, reader = read_header(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    assert [(t.name, t.kind, t.shape, t.offset, t.bytes) for t in header.tensors] == [
        (t.name, t.tensor_type, tuple(map(int, reversed(t.shape))), t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    for key, value in header.metadata.items():
        assert value is None or value == reader.fields[key].contents()


@pytest.mark.parametrize("architecture", ["smollm2", "llama", "qwen3moe"])
def test_the_configuration_is_that_of_the_whole_file(architecture: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    """The vocabulary is left out before transformers reads it: nothing else may be different."""
    from transformers import AutoConfig

    path = smollm2_gguf
    if architecture != "smollm2":
        path = write(tmp_path / "m.gguf", architecture, config_for(architecture), kind=KINDS.Q8_0)
    with open_checkpoint(path) as source:
        found = source.config.to_dict()
    expected = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).to_dict()
    differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    assert differing - {"_name_or_path"} <= ({"moe_intermediate_size"} if architecture == "qwen3moe" else set())


@pytest.mark.parametrize("at", [4, 8, 16])
def test_a_header_that_announces_nonsense(tmp_path: Path, at: int) -> None:
    path = write(tmp_path / "m.gguf", "llama", config_for("llama"), kind=KINDS.F32)
    data = bytearray(path.read_bytes())
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_checkpoint(path)


@pytest.mark.parametrize("architecture", ["rwkv7", "qwen35"])
def test_an_architecture_whose_tensors_would_be_taken_wrongly(tmp_path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_tensor("a", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=architecture):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_tokenizer_comes_from_the_file_itself(smollm2_gguf: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    text = "Two sockets, one model: 2×3=6?"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(models.save(models.build(models.llama()), tmp_path / "without"))


def test_a_directory_with_only_gguf_names_the_file(smollm2_gguf: Path, tmp_path: Path) -> None:
    shutil.copy(smollm2_gguf, tmp_path / "small.gguf")
    with pytest.raises(CheckpointError, match=r"small\.gguf"):
        open_checkpoint(tmp_path)
