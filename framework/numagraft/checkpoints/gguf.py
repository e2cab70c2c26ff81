"""GGUF files: configuration and names through transformers' own tables, tensors dequantised one at a time.

Names, head permutations and merged experts follow `transformers.modeling_gguf_pytorch_utils`; what differs is that no
tensor is read before it is asked for, and experts can be read one by one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from numagraft.checkpoints.files import UncachedFile, large_tensor
from numagraft.checkpoints.gguf_header import Header, Stored, read_header, without_vocabulary
from numagraft.checkpoints.mapping import Checkpoint, LazyTensor
from numagraft.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    Process = Callable[[np.ndarray], np.ndarray]

_AGAIN = "copy or download it again"


def _shape_only(process: Process, shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape to run `process` on for the shape of what comes out.

    Its elements take no bytes, so permuting them is free; arithmetic (on norms, which are small) needs real numbers.
    """
    empty = np.empty(shape, dtype=np.dtype([]))
    try:
        process(empty)
    except TypeError:
        return np.full(shape, -1, dtype=np.float32)  # negative, as the state matrices that Mamba takes the logarithm of
    return empty


class GgufTensor(LazyTensor):
    """One tensor of the file, float32 (or the file's own float type), processed into transformers' layout."""

    def __init__(self, name: str, stored: Stored, file: UncachedFile, process: Process | None) -> None:
        import gguf

        self.kind = stored.kind
        plain = {
            gguf.GGMLQuantizationType.F32: torch.float32,
            gguf.GGMLQuantizationType.F16: torch.float16,
            gguf.GGMLQuantizationType.BF16: torch.bfloat16,
        }
        shape = stored.shape
        self._plain = plain.get(self.kind)
        self._block = gguf.GGML_QUANT_SIZES[self.kind]
        self._file, self._offset, self._bytes = file, stored.offset, stored.bytes
        self._process = process
        self._stored_shape = shape
        if process is not None:
            shape = process(_shape_only(process, shape)).shape
        super().__init__(name, self._plain or torch.float32, shape)

    @property
    def source_bytes(self) -> int:
        return self._bytes

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._finish(self._values(self._stored_shape, 0), out)

    def read_part(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._process is not None:
            return super().read_part(index, out)
        shape = self._stored_shape[1:]
        return self._finish(self._values(shape, index * self._stored_bytes(shape)), out)

    def _stored_bytes(self, shape: tuple[int, ...]) -> int:
        elements, size = self._block
        return math.prod(shape) // elements * size

    def _values(self, shape: tuple[int, ...], begin: int) -> torch.Tensor:
        from gguf.quants import dequantize

        if self._plain is not None:
            return self._file.read_tensor(large_tensor(shape, self._plain), self._offset + begin)
        elements, size = self._block
        blocks = torch.empty((*shape[:-1], shape[-1] // elements * size), dtype=torch.uint8)
        self._file.read_tensor(blocks, self._offset + begin)
        return torch.from_numpy(dequantize(blocks.numpy(), self.kind)).reshape(shape)

    def _finish(self, values: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self._process is not None:
            # numpy has no bfloat16
            plain = values.float() if values.dtype is torch.bfloat16 else values
            values = torch.from_numpy(np.ascontiguousarray(self._process(plain.numpy()))).to(values.dtype)
        return values if out is None else out.copy_(values)


class MergedExperts(LazyTensor):
    """`gate_up_proj [E, 2I, H]` of a file that stores gate and up apart, both [E, I, H]."""

    def __init__(self, name: str, gate: GgufTensor, up: GgufTensor) -> None:
        if gate.shape != up.shape or gate.dtype != up.dtype or len(gate.shape) != 3:
            raise CheckpointError(f"{name}: the file's gate {gate!r} and up {up!r} differ, so they cannot be merged")
        experts, rows, columns = gate.shape
        super().__init__(name, gate.dtype, (experts, 2 * rows, columns))
        self._gate, self._up = gate, up

    @property
    def source_bytes(self) -> int:
        return self._gate.source_bytes + self._up.source_bytes

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        merged = torch.empty(self.shape, dtype=self.dtype) if out is None else out
        for index in range(self.shape[0]):
            self.read_part(index, merged[index])
        return merged

    def read_part(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        merged = torch.empty(self.shape[1:], dtype=self.dtype) if out is None else out
        rows = self.shape[1] // 2
        self._gate.read_part(index, merged[:rows])
        self._up.read_part(index, merged[rows:])
        return merged


#: llama.cpp's own tables (rope factors), which have no place in the model
_TABLES = ("rope_",)
#: sizes of a mixture of experts that transformers' tables leave at the defaults of the configuration class
_EXPERT_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def read_config(path: Path, header: Header) -> PreTrainedConfig:
    """The configuration that transformers derives from the file's metadata; raises CheckpointError where it cannot."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    supported = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    if _letters(header.architecture) not in {_letters(name) for name in supported}:
        # some newer ones can be configured, but their tensors are converted by rules that are not applied here
        raise CheckpointError(
            f"{path} holds the GGUF architecture {header.architecture!r}, which is not supported; give the safetensors "
            f"checkpoint of this model. Supported: {', '.join(supported)}"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="numagraft-") as directory:
            light = Path(directory) / "model.gguf"
            light.write_bytes(without_vocabulary(path, header))
            config = AutoConfig.from_pretrained(directory, gguf_file=light.name, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} describes a model that transformers cannot configure ({type(error).__name__}: {error}); give the "
            "safetensors checkpoint of this model"
        ) from error
    config._name_or_path = str(path)
    return config


def _letters(name: str) -> str:
    """A name without what files and transformers spell differently: qwen3moe and qwen3_moe are one architecture."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


class _WholeNames:
    """A model whose parameters transformers maps as one, without going into each submodule."""

    def __init__(self, skeleton: PreTrainedModel) -> None:
        self.config = skeleton.config
        self.state_dict = skeleton.state_dict

    def named_children(self) -> list[tuple[str, object]]:
        return []


def _has_place(stored_name: str, names: dict[str, str]) -> bool:
    return stored_name in names or stored_name.startswith(_TABLES) or _merged_part(stored_name, names) is not None


def _merged_part(stored_name: str, names: dict[str, str]) -> tuple[str, str] | None:
    """(model name, gate|up|down) for a tensor of all experts; the map may hold it with or without ".weight"."""
    base = stored_name.removesuffix(".weight")
    for part in ("gate", "up", "down"):
        if base.endswith(f".ffn_{part}_exps"):
            name = names.get(base) or names.get(stored_name)
            return None if name is None else (name, part)
    return None


class GgufCheckpoint(Checkpoint):
    """One GGUF file. Its names are known only for a model: `bind` first."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.architecture, self._stored = header.architecture, header.tensors
        super().__init__(str(path), read_config(path, header))
        for key, attribute in _EXPERT_SIZES.items():
            size = header.metadata.get(f"{self.architecture}.{key}")
            if isinstance(size, int) and hasattr(self.config, attribute):
                setattr(self.config, attribute, size)
        self.path = path
        self._file = UncachedFile(path)
        self._deferred = False

    def defer(self) -> None:
        self._deferred = True
        super().defer()

    @property
    def dtype(self) -> torch.dtype:
        """float32 for quantised files, the half type for files that hold one, as transformers has it."""
        kinds = {stored.kind.name for stored in self._stored}
        if not kinds <= {"F32", "F16", "BF16"} or kinds <= {"F32"}:
            return torch.float32
        return torch.bfloat16 if "BF16" in kinds else torch.float16

    def bind(self, skeleton: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            GptOssTensorProcessor,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=self.config.to_dict())
        if isinstance(processor, GptOssTensorProcessor):
            raise CheckpointError(
                f"{self.path}: gpt-oss in GGUF is not supported; give its safetensors checkpoint in bf16"
            )
        try:
            names = get_gguf_hf_weights_map(_WholeNames(skeleton), processor)
            if any(not _has_place(stored.name, names) for stored in self._stored):
                # families whose files use the names of the inner model: transformers then asks every submodule, slowly
                names = get_gguf_hf_weights_map(skeleton, processor)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self.tensors = {}
        halves: dict[str, dict[str, GgufTensor]] = {}
        for stored in self._stored:
            merged = _merged_part(stored.name, names)
            if merged is not None:
                name, part = merged
                tensor = GgufTensor(name, stored, self._file, None)
                if part == "down":
                    self.tensors[name] = tensor
                else:
                    halves.setdefault(name, {})[part] = tensor
            elif stored.name in names:
                name = names[stored.name]
                self.tensors[name] = GgufTensor(name, stored, self._file, self._process(processor, stored.name))
            else:
                # shows as unexpected
                if not stored.name.startswith(_TABLES):
                    self.tensors[stored.name] = GgufTensor(stored.name, stored, self._file, None)
        for name, parts in halves.items():
            if set(parts) != {"gate", "up"}:
                raise CheckpointError(f"{self.path}: {name} has only its {' '.join(parts)} half; {_AGAIN}")
            self.tensors[name] = MergedExperts(name, parts["gate"], parts["up"])
        if self._deferred:
            self.defer()

    @staticmethod
    def _process(processor: object, stored_name: str) -> Process | None:
        if stored_name == "output.weight":  # no family changes its head, and GPT-2's processor keeps it to itself
            return None
        return lambda weights: processor.process(weights=weights, name=stored_name).weights

    def drop_pages(self) -> None:
        self._file.drop()

    def page_cache_residue(self) -> int | None:
        return self._file.cached_bytes()

    def close(self) -> None:
        self._file.close()
