"""Safetensors files, one or sharded, read tensor by tensor with `pread`.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, little endian; the header, a JSON
object of name -> {dtype, shape, data_offsets relative to the end of the header}; the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from numagraft.checkpoints import quantised
from numagraft.checkpoints.files import UncachedFile, large_tensor
from numagraft.checkpoints.mapping import DTYPE_NAMES, Checkpoint, LazyTensor
from numagraft.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

    from numagraft.contract import StoredMatrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_CODINGS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3"}
#: the limit that the reference implementation sets too
_MOST_HEADER_BYTES = 100_000_000
_SHOWN = 8


class SafetensorsTensor(LazyTensor):
    """A tensor at a known place of an open file."""

    def __init__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], file: UncachedFile, offset: int) -> None:
        super().__init__(name, dtype, shape)
        self._file = file
        self._offset = offset

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._file.read_tensor(large_tensor(self.shape, self.dtype) if out is None else out, self._offset)

    def read_part(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        part = torch.empty(self.shape[1:], dtype=self.dtype) if out is None else out
        return self._file.read_tensor(part, self._offset + index * part.numel() * self.dtype.itemsize)

    def _place(self, index: int | None) -> tuple[int, int]:
        """Offset and count of the bytes of all values, or of one part."""
        count = self.nbytes if index is None else self.nbytes // self.shape[0]
        return self._offset + (index or 0) * count, count

    def stored(self, index: int | None = None) -> StoredMatrix | None:
        shape = self.shape if index is None else self.shape[1:]
        if self.dtype is torch.uint8 and len(shape) == 3:  # rows of groups of 16 bytes: e2m1
            return self._file.matrix(self._place(index)[0], "e2m1", shape[0], 2 * shape[1] * shape[2])
        if len(shape) != 2 or self.dtype not in _CODINGS:
            return None
        return self._file.matrix(self._place(index)[0], _CODINGS[self.dtype], *shape)

    def was_read(self, index: int | None = None) -> None:
        begin, count = self._place(index)
        self._file.note_read(begin, begin + count)

    def prefetch(self, index: int | None = None) -> int:
        begin, count = self._place(index)
        self._file.will_need(begin, count)
        return count


def read_header(file: UncachedFile) -> dict[str, SafetensorsTensor]:
    """Every tensor of a file, checked against the file's size; raises CheckpointError with all that is wrong."""
    again = "copy or download it again"
    if file.size < 8:
        raise CheckpointError(f"{file.path} is {file.size} bytes long, too short for a safetensors file: {again}")
    prefix = bytearray(8)
    file.read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    if length > min(file.size - 8, _MOST_HEADER_BYTES):
        raise CheckpointError(
            f"{file.path} announces a header of {length} bytes, but the file has {file.size}: it is truncated or not a "
            f"safetensors file; {again}"
        )
    text = bytearray(length)
    file.read_into(memoryview(text), 8)
    try:
        header = json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file.path} has no readable header ({error}): it is damaged; {again}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path} has a header that is no mapping of names: it is damaged; {again}")
    header.pop("__metadata__", None)
    tensors, problems = {}, []
    for name, entry in header.items():
        try:
            tensors[name] = _entry(name, entry, file, 8 + length)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(Problem(name, str(error)))
    if problems:
        raise CheckpointError(
            f"{file.path} does not hold what its header announces ({len(problems)} of {len(header)} tensors): it is "
            f"truncated or damaged; {again}",
            problems[:_SHOWN],
        )
    return tensors


def _entry(name: str, entry: Any, file: UncachedFile, data_begin: int) -> SafetensorsTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"has the dtype {entry['dtype']!r}, which is not supported")
    shape = entry["shape"]
    begin, end = entry["data_offsets"]
    whole = [*shape, begin, end]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in whole):
        raise ValueError(f"has shape {shape} and offsets {[begin, end]}, which are no sizes")
    tensor = SafetensorsTensor(name, dtype, tuple(shape), file, data_begin + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"takes {end - begin} bytes, but its shape {shape} in {entry['dtype']} needs {tensor.nbytes}")
    if data_begin + end > file.size:
        raise ValueError(f"ends at byte {data_begin + end}, but the file ends at {file.size}")
    return tensor


def find_shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint and, where there is an index, which file holds which name.

    Raises CheckpointError when there is none, when a shard is missing, or when the index names files elsewhere.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        if (directory / SINGLE_FILE).is_file():
            return [directory / SINGLE_FILE], None
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(others) == 1:
            return [directory / others[0]], None
        if others:
            raise CheckpointError(
                f"{directory} holds {len(others)} safetensors files but no {INDEX_FILE}, so it cannot be told which belong "
                "together; download the index of the checkpoint too"
            )
        found = "PyTorch .bin files, which can run code when read" if list(directory.glob("*.bin")) else "no weights"
        raise CheckpointError(
            f"{directory} holds {found}: numagraft reads safetensors and GGUF; give a directory with {SINGLE_FILE} or "
            f"{INDEX_FILE}, or a .gguf file (save_pretrained of transformers writes safetensors)"
        )
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({Path(name) for name in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a readable index ({error}); download it again") from error
    outside = [str(name) for name in names if name.name != str(name)]
    if outside:
        raise CheckpointError(
            f"{index} points outside its directory ({', '.join(outside[:_SHOWN])}): it is not trusted"
        )
    missing = [name.name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the {len(names)} shards that {INDEX_FILE} lists: "
            f"{', '.join(missing[:_SHOWN])}; download the missing files"
        )
    return [directory / name for name in names], where


class SafetensorsCheckpoint(Checkpoint):
    """A directory with safetensors files, sharded or not."""

    def __init__(self, directory: Path, config: PreTrainedConfig) -> None:
        super().__init__(str(directory), config)
        self.directory = directory
        paths, index = find_shards(directory)
        self._files: list[UncachedFile] = []
        self._open(paths)
        if index is not None:
            lacking = [Problem(name, f"is not in {shard}") for name, shard in index.items() if name not in self.tensors]
            if lacking:
                self.close()
                raise CheckpointError(
                    f"{directory}: {len(lacking)} tensors that {INDEX_FILE} lists are in no shard: index and shards are of "
                    "different checkpoints; download them again",
                    lacking[:_SHOWN],
                )

    @classmethod
    def of_files(cls, source: str, config: PreTrainedConfig, paths: list[Path]) -> SafetensorsCheckpoint:
        """Of files that somebody else has already found."""
        checkpoint = cls.__new__(cls)
        Checkpoint.__init__(checkpoint, source, config)
        checkpoint.directory = paths[0].parent
        checkpoint._files = []
        checkpoint._open(paths)
        return checkpoint

    def join_quantised(self, quantisation: Mapping[str, Any]) -> None:
        """From now on codes and scales are one tensor (see `quantised`). Raises CheckpointError where they do not fit."""
        dtype = self.dtype if self.dtype.itemsize > 1 else torch.bfloat16
        try:
            self.tensors = quantised.join(self.source, self.tensors, quantisation, dtype)
        except CheckpointError:
            self.close()
            raise

    def _open(self, paths: list[Path]) -> None:
        try:
            for path in paths:
                file = UncachedFile(path)
                self._files.append(file)
                self.tensors.update(read_header(file))
        except BaseException:
            self.close()
            raise

    def generation_config(self) -> GenerationConfig | None:
        from transformers import GenerationConfig

        if not (self.directory / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.directory, local_files_only=True)

    def drop_pages(self) -> None:
        for file in self._files:
            file.drop()

    def page_cache_residue(self) -> int | None:
        counts = [file.cached_bytes() for file in self._files]
        return None if None in counts else sum(counts)

    def close(self) -> None:
        for file in self._files:
            file.close()
