"""The header of a GGUF file: metadata and the table of tensors (github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The `gguf` package's reader makes an array of every token of the vocabulary, seconds for a file that loads in one. This one
steps over them, and holds every count and offset against the size of the file.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from numagraft.errors import CheckpointError, Problem

_AGAIN = "copy or download it again"
_VERSIONS = (2, 3)
#: fixed-size value types by their number in the file
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 8
#: limits far above any real file's, so that a hostile one cannot keep the reader busy
_MOST_STRINGS, _MOST_ENTRIES = 1 << 24, 1 << 20


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file; `shape` in torch's order, `offset` and `bytes` in the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """Scalar and string metadata (arrays are stepped over: None), and the tensors in file order.

    `places` is where each key and its value stand in the file, `lengths` the number of elements of each array.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[Stored, ...]
    places: dict[str, tuple[int, int]]
    lengths: dict[str, int]


class _Cursor:
    """Reads little-endian values; everything it is told to read must lie within the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0
        self.array_length = -1  # of the value that was read last; -1 where it was no array

    def skip(self, count: int) -> int:
        begin, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self._data):
            raise EOFError(f"{count} bytes are announced at byte {begin}, but the file has {len(self._data)}")
        return begin

    def numbers(self, codes: str) -> tuple[Any, ...]:
        format_ = "<" + codes
        return struct.unpack_from(format_, self._data, self.skip(struct.calcsize(format_)))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        begin = self.skip(length)
        return self._data[begin : self.at].decode("utf-8")

    def value(self) -> Any:
        (kind,) = self.numbers("I")
        self.array_length = -1
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"there is a value of the unknown type {kind} before byte {self.at}")
        self.array_length = self._skip_array()
        return None

    def _skip_array(self, depth: int = 0) -> int:
        element, count = self.numbers("IQ")
        if element not in _SCALARS and count > _MOST_STRINGS:
            raise ValueError(f"there is an array of {count} elements before byte {self.at}")
        if element in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                (length,) = self.numbers("Q")
                self.skip(length)
        elif element == _ARRAY and depth < 4:
            for _ in range(count):
                self._skip_array(depth + 1)
        else:
            raise ValueError(f"there is an array of the unknown type {element} before byte {self.at}")
        return count


def read_header(path: Path) -> Header:
    """The header of a whole GGUF file; raises CheckpointError for a truncated or damaged one, or one that is none."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(_Cursor(data))
    except (EOFError, ValueError, KeyError, OSError, OverflowError, MemoryError) as error:
        text = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} ({size} bytes) cannot be read as GGUF: {text}; it is truncated, damaged or no GGUF file: {_AGAIN}"
        ) from None
    beyond = [Problem(each.name, f"ends at byte {each.offset + each.bytes}") for each in _beyond(header, size)]
    if beyond:
        raise CheckpointError(
            f"{path} ends at byte {size}, before {len(beyond)} of its {len(header.tensors)} tensors do: it is truncated; "
            f"{_AGAIN}",
            beyond[:8],
        )
    return header


def _beyond(header: Header, size: int) -> list[Stored]:
    return [each for each in header.tensors if each.offset + each.bytes > size]


def _parse(cursor: _Cursor) -> Header:
    magic, version, tensor_count, value_count = cursor.numbers("4sIQQ")
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if version not in _VERSIONS:
        raise ValueError(f"it has the version {version}; versions {' and '.join(map(str, _VERSIONS))} are supported")
    if max(tensor_count, value_count) > _MOST_ENTRIES:
        raise ValueError(f"it announces {tensor_count} tensors and {value_count} values")
    metadata: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    lengths: dict[str, int] = {}
    for _ in range(value_count):
        begin = cursor.at
        key = cursor.string()
        metadata[key] = cursor.value()
        places[key] = (begin, cursor.at)
        if cursor.array_length >= 0:
            lengths[key] = cursor.array_length
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it does not name its general.architecture")
    stored = tuple(Stored(name, kind, shape, begin + offset, count) for name, kind, shape, offset, count in entries)
    return Header(architecture, metadata, stored, places, lengths)


def without_vocabulary(path: Path, header: Header) -> bytes:
    """A GGUF file of the same metadata and tensor names, but without the tokenizer's arrays and with one value per tensor.

    What only reads the configuration reads this in milliseconds. The vocabulary's size, which some files tell only by its
    length, is added.
    """
    kept = {
        key: place
        for key, place in header.places.items()
        if not (key.startswith("tokenizer.") and key in header.lengths)
    }
    size_key = f"{header.architecture}.vocab_size"
    extra = b""
    if size_key not in header.metadata and "tokenizer.ggml.tokens" in header.lengths:
        extra = _string(size_key) + struct.pack("<II", 4, header.lengths["tokenizer.ggml.tokens"])
    with path.open("rb") as file:
        values = b"".join(os.pread(file.fileno(), end - begin, begin) for begin, end in kept.values())
    alignment = header.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    table = b"".join(
        _string(each.name) + struct.pack("<IQIQ", 1, 1, 0, index * alignment)
        for index, each in enumerate(header.tensors)
    )
    counts = struct.pack("<4sIQQ", b"GGUF", 3, len(header.tensors), len(kept) + bool(extra))
    head = counts + values + extra + table
    return head + bytes(-len(head) % alignment + len(header.tensors) * alignment)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _entry(cursor: _Cursor) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int, int]:
    name = cursor.string()
    (dimensions,) = cursor.numbers("I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reversed(cursor.numbers(f"{dimensions}Q")))
    number, offset = cursor.numbers("IQ")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{name} is stored in the unknown type {number}") from None
    elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % elements:
        raise ValueError(f"{name} has rows of {shape[-1]} elements, but {kind.name} stores blocks of {elements}")
    return name, kind, shape, offset, math.prod(shape) // elements * block_bytes
