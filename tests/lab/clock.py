"""The rate of this machine's time stamp counter, which an emulated guest reads too.

A guest that boots while its host is busy calibrates the counter wrongly, and its clock then runs up to several times too
fast: timeouts and sleeps in it mean nothing. So it is told.
"""

from __future__ import annotations

import ctypes
import mmap
import time

READ_COUNTER = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret


def counter_khz(*, seconds: float = 0.05) -> int | None:
    """Measured; None where code may not be placed in memory. The caller is on x86-64."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(READ_COUNTER)
    code = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
    rates = []
    for _ in range(5):  # the median: between two readings this process may lose its CPU
        begin = time.monotonic_ns(), read()
        time.sleep(seconds / 5)
        end = time.monotonic_ns(), read()
        rates.append((end[1] - begin[1]) / (end[0] - begin[0]))
    return round(sorted(rates)[2] * 1e6)
