"""A process's memory seen from outside, and what of a file lies in the page cache. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

#: memory that belongs to the process alone or that it made: what a load may not multiply
OWN_FIELDS = ("RssAnon", "RssShmem", "HugetlbPages")

_SAMPLER = """
import os, sys, time
pid, fields, peak = sys.argv[1], sys.argv[2].encode().split(b","), 0
fd = os.open(f"/proc/{pid}/status", os.O_RDONLY)
os.set_blocking(0, False)
print("ready", flush=True)
while True:
    now = sum(int(line.split()[1]) for line in os.pread(fd, 1 << 16, 0).splitlines() if line.split(b":")[0] in fields)
    peak = max(peak, now)
    try:
        if os.read(0, 1) is not None:
            break
    except BlockingIOError:
        pass
    time.sleep(0.004)
print(peak * 1024, flush=True)
"""


def own_bytes(pid: int | str = "self") -> int:
    """Anonymous, shared and huge-page memory of a process that is resident now."""
    text = Path(f"/proc/{pid}/status").read_text()
    rows = (line.split() for line in text.splitlines() if line.partition(":")[0] in OWN_FIELDS)
    return sum(int(row[1]) for row in rows) * 1024


class PeakMemory:
    """The largest `own_bytes` of this process between entering and leaving, sampled every 4 ms by another process.

    A thread of our own would wait for the interpreter lock exactly when a long copy makes the peak. `bytes` is set on
    leaving.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        self._sampler = subprocess.Popen(
            [sys.executable, "-c", _SAMPLER, str(os.getpid()), ",".join(OWN_FIELDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._sampler.stdout is not None
        if self._sampler.stdout.readline() != "ready\n":
            raise OSError("the process that samples memory did not start")
        return self

    def __exit__(self, *_: object) -> None:
        out, _err = self._sampler.communicate("x", timeout=30)
        self.bytes = int(out)


def cached_bytes(paths: Iterable[Path]) -> int:
    """Bytes of the files that lie in the page cache (mincore; the files must be ours).

    Raises OSError when the kernel refuses.
    """
    return sum(_cached_bytes_of(path) for path in paths)


def _cached_bytes_of(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def failed(call: str) -> OSError:
        return OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}", str(path))

    resident = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise failed("mmap")
    try:
        if libc.mincore(address, size, resident):
            raise failed("mincore")
    finally:
        libc.munmap(address, size)
    return sum(byte & 1 for byte in resident.raw) * mmap.PAGESIZE


def warm(paths: Iterable[Path]) -> None:
    """Reads the files once, so that they lie in the page cache as far as there is room."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(paths: Iterable[Path]) -> None:
    """Writes the files out and asks the kernel to forget their pages."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
