"""A checkpoint as a mapping of parameter names to tensors that are read only when asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from numagraft.contract import StoredMatrix

#: safetensors' names of dtypes, which transformers also asks lazy tensors for
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class LazyTensor(ABC):
    """One tensor of a checkpoint: name, dtype and shape are known, the values are read by `read`."""

    #: when True, the loader of transformers is handed the lazy tensor itself, and numagraft's conversion reads it
    deferred = False
    #: the dtype that the loader asked for before conversion, where it did
    requested: torch.dtype | None = None

    def __init__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = torch.Size(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in `dtype`."""
        return self.numel() * self.dtype.itemsize

    @property
    def source_bytes(self) -> int:
        """Bytes that are read from the checkpoint for it."""
        return self.nbytes

    @abstractmethod
    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """All values, contiguous, written to `out` (same shape and dtype) where it is given.

        Raises CheckpointError when the file ends early or cannot be read.
        """

    def read_part(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values at `index` of the first dimension: one expert of a fused parameter."""
        part = self.read()[index]
        return part.clone() if out is None else out.copy_(part)

    def stored(self, index: int | None = None) -> StoredMatrix | None:
        """Where the values of a matrix (or of one part of three dimensions) lie in the file, output channels by rows, for
        operators that read them there themselves; None where they do not lie so."""
        return None

    def was_read(self, index: int | None = None) -> None:  # noqa: B027
        """Tells that somebody else has read the values (or one part) where `stored` says."""

    def prefetch(self, index: int | None = None) -> int:
        """Tells the kernel that the values (or one part) are read soon; returns the bytes told, 0 where it is no use."""
        return 0

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self.dtype, str(self.dtype))

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> Any:
        if self.deferred and index is Ellipsis:
            return self
        return self.read()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> LazyTensor:
        """What the loader of transformers calls on a deferred tensor: notes the dtype, reads nothing."""
        if dtype is not None:
            self.requested = dtype
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.get_dtype()}, {list(self.shape)})"


class Checkpoint(Mapping[str, LazyTensor]):
    """Where a model's weights, configuration and generation settings come from.

    Iterates over names in file order. Use as a context manager: leaving it closes every file.
    """

    def __init__(self, source: str, config: PreTrainedConfig) -> None:
        self.source = source
        self.config = config
        self.tensors: dict[str, LazyTensor] = {}

    def bind(self, skeleton: PreTrainedModel) -> None:
        """Tells the checkpoint which model its names are for; those that store other names (GGUF) need it."""

    def defer(self) -> None:
        """From now on the loader of transformers gets the lazy tensors themselves."""
        for tensor in self.tensors.values():
            tensor.deferred = True

    @property
    def dtype(self) -> torch.dtype:
        """What `dtype="auto"` means: the configuration's, else that of the first floating tensor."""
        configured = getattr(self.config, "dtype", None)
        if isinstance(configured, torch.dtype):
            return configured
        return next((t.dtype for t in self.tensors.values() if t.is_floating_point()), torch.float32)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors.values())

    def generation_config(self) -> GenerationConfig | None:
        """The generation settings that ship with it, if any."""
        return None

    def drop_pages(self) -> None:
        """Asks the kernel to forget the pages of its files."""

    def page_cache_residue(self) -> int | None:
        """Bytes of its files that are in the page cache now; None when the kernel does not tell."""
        return 0

    def close(self) -> None:
        """Closes files and asks the kernel to forget their pages."""

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
