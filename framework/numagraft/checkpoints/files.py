"""Reading files without leaving a second copy of them in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from numagraft.contract import StoredMatrix
from numagraft.errors import CheckpointError

#: Linux reads at most this much per call
_MOST_PER_READ = 1 << 30
#: how much may gather in the page cache before it is dropped
_DROP_EVERY = 64 << 20


#: threads that share a large read, the caller included
_READERS = min(4, len(os.sched_getaffinity(0)))
_LEAST_PIECE = 512 << 10
_LEAST_LARGE = 4 << 20


@cache
def _threads_of(process: int, what: str, count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=count, thread_name_prefix=f"numagraft-{what}")


def _readers() -> ThreadPoolExecutor:
    """The reading threads of this process; a forked child starts its own."""
    return _threads_of(os.getpid(), "read", _READERS - 1)


def _dropper() -> ThreadPoolExecutor:
    """The thread that empties the page cache: the kernel makes whoever asks wait for every CPU."""
    return _threads_of(os.getpid(), "drop", 1)


def large_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of arbitrary values, from 4 MiB on in huge pages where the system gives them on request.

    A page fault costs about what clearing its 4 KiB costs, in a virtual machine much more; huge pages take 512 times fewer.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < _LEAST_LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


class Intervals:
    """Disjoint ranges [begin, end), merged where they touch; remembers which have grown."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._grown: set[tuple[int, int]] = set()

    def add(self, begin: int, end: int) -> None:
        first = bisect_left(self._ranges, begin, key=lambda range_: range_[1])
        last = bisect_right(self._ranges, end, key=lambda range_: range_[0])
        merged = self._ranges[first:last]
        if merged:
            begin, end = min(begin, merged[0][0]), max(end, merged[-1][1])
        self._ranges[first:last] = [(begin, end)]
        self._grown.difference_update(merged)
        self._grown.add((begin, end))

    def take_grown(self) -> list[tuple[int, int]]:
        """The ranges that have grown since this was last asked, in order."""
        grown = sorted(self._grown)
        self._grown.clear()
        return grown

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)


class UncachedFile:
    """A read-only file: `pread` into memory of the caller, and `posix_fadvise(DONTNEED)` for what was read, every 64 MiB.

    A mapped file would count as resident until it is closed, and the page cache would hold a second copy of the model. File
    systems cache in folios of up to megabytes, and a range drops only those that lie in it as a whole, so neighbouring
    tensors are dropped together. What was not read yet stays: it may have been read ahead.
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
        self._read = Intervals()
        self._dropping: Future[None] | None = None

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fills `memory` (bytes) from `offset`; raises CheckpointError where the file ends early."""
        if self._descriptor is None:
            raise CheckpointError(f"{self.path} was closed before all of it was read")
        # copying out of the page cache is bound by one core's speed, so large reads are shared
        pieces = max(1, min(_READERS, len(memory) // _LEAST_PIECE))
        if pieces == 1:
            self._read_piece(memory, offset)
        else:
            step = -(-len(memory) // pieces // mmap.PAGESIZE) * mmap.PAGESIZE
            starts = range(step, len(memory), step)
            waiting = [_readers().submit(self._read_piece, memory[at : at + step], offset + at) for at in starts]
            try:
                self._read_piece(memory[:step], offset)
            finally:
                wait(waiting)
            for piece in waiting:
                piece.result()
        self.note_read(offset, offset + len(memory))

    def will_need(self, offset: int, count: int) -> None:
        """Lets the kernel start reading; costs microseconds where the pages are there already."""
        if self._descriptor is not None:
            os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def _read_piece(self, memory: memoryview, offset: int) -> None:
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

    def matrix(self, offset: int, coding: str, rows: int, columns: int, scales: torch.Tensor | None = None) -> StoredMatrix:
        """Contiguous values in this file, for whoever reads them itself; `note_read` follows."""
        if self._descriptor is None:
            raise CheckpointError(f"{self.path} was closed before all of it was read")
        return StoredMatrix(self._descriptor, offset, self.size, coding, rows, columns, columns, scales)

    def note_read(self, begin: int, end: int) -> None:
        """These bytes are not needed again: their pages are dropped, by a thread of its own and many at once."""
        self._read.add(begin, end)
        self._undropped += end - begin
        if self._undropped >= _DROP_EVERY:
            self._undropped = 0
            self._wait_for_dropping()  # at most one is on its way, so that pages do not gather
            self._dropping = _dropper().submit(self._drop_ranges, self._read.take_grown())

    def _drop_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        for begin, end in ranges:
            os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _wait_for_dropping(self) -> None:
        if self._dropping is not None:
            self._dropping.result()
            self._dropping = None

    def drop(self) -> None:
        """Asks the kernel to forget all of the file's pages; those that are dirty, or mapped by others, stay."""
        self._wait_for_dropping()
        if self._descriptor is not None:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_tensor(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        """Fills a contiguous CPU tensor with the bytes at `offset`."""
        if tensor.numel():
            self.read_into(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), offset)
        return tensor

    def cached_bytes(self) -> int | None:
        """Bytes of the file that are in the page cache now (`mincore`); None when the kernel does not tell."""
        self._wait_for_dropping()
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
