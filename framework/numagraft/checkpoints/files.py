"""Reading files without leaving a second copy of them in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch

from numagraft.errors import CheckpointError

#: Linux reads at most this much per call
_MOST_PER_READ = 1 << 30
#: how much may gather in the page cache before it is dropped
_DROP_EVERY = 64 << 20


class UncachedFile:
    """A read-only file: `pread` into memory of the caller, and `posix_fadvise(DONTNEED)` every 64 MiB.

    A mapped file would count as resident until it is closed, and the page cache would hold a second copy of the model. The
    whole file is dropped each time: file systems cache in folios of up to megabytes, and a range drops only those that lie
    in it as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened: {error.strerror}; check that the file exists and may be read"
            ) from error
        self.size = os.fstat(self._descriptor).st_size
        self._undropped = 0

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fills `memory` (bytes) from `offset`; raises CheckpointError where the file ends early."""
        if self._descriptor is None:
            raise CheckpointError(f"{self.path} was closed before all of it was read")
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[done : done + _MOST_PER_READ]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: reading {len(memory)} bytes at {offset} failed: {error.strerror}; "
                    "check the disk, or copy or download the file again"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, but {offset + len(memory)} bytes are needed: "
                    "the file is truncated; copy or download it again"
                )
            done += count
        self._undropped += done
        if self._undropped >= _DROP_EVERY:
            self.drop()

    def drop(self) -> None:
        """Asks the kernel to forget the file's pages; those that are dirty, or mapped by others, stay."""
        if self._descriptor is not None:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._undropped = 0

    def read_tensor(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        """Fills a contiguous CPU tensor with the bytes at `offset`."""
        if tensor.numel():
            self.read_into(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), offset)
        return tensor

    def cached_bytes(self) -> int | None:
        """Bytes of the file that are in the page cache now (`mincore`); None when the kernel does not tell."""
        if self.size == 0 or self._descriptor is None:
            return 0
        pages = -(-self.size // mmap.PAGESIZE)
        # a private writable mapping, since ctypes only takes the address of a writable buffer; nothing is written
        with mmap.mmap(
            self._descriptor, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        ) as view:
            anchor = ctypes.c_char.from_buffer(view)
            try:
                resident = (ctypes.c_ubyte * pages)()
                libc = ctypes.CDLL(None, use_errno=True)
                status = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(self.size), resident)
            finally:
                del anchor
        return None if status else sum(1 for page in bytes(resident) if page & 1) * mmap.PAGESIZE

    def close(self) -> None:
        if self._descriptor is not None:
            self.drop()
            os.close(self._descriptor)
            self._descriptor = None
