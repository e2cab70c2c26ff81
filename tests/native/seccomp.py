"""A seccomp filter as sandboxes set it: the given system calls end with an errno, all others pass. Raw BPF, no library."""

from __future__ import annotations

import ctypes
import platform

NUMBERS = {
    "x86_64": {
        "mbind": 237,
        "set_mempolicy": 238,
        "get_mempolicy": 239,
        "migrate_pages": 256,
        "move_pages": 279,
        "set_mempolicy_home_node": 450,
        "sched_setaffinity": 203,
    },
    "aarch64": {
        "mbind": 235,
        "get_mempolicy": 236,
        "set_mempolicy": 237,
        "migrate_pages": 238,
        "move_pages": 239,
        "set_mempolicy_home_node": 450,
        "sched_setaffinity": 122,
    },
}

#: what Docker's default profile refuses without CAP_SYS_NICE
DOCKER = ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "migrate_pages", "set_mempolicy_home_node")


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


def refuse(calls: tuple[str, ...], errno: int) -> None:
    """From now on, in this thread and those it makes, `calls` fail with `errno`; cannot be undone."""
    numbers = [NUMBERS[platform.machine()][call] for call in calls]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    program = [_Filter(load, 0, 0, 0)]  # seccomp_data.nr
    for index, number in enumerate(numbers):
        program.append(_Filter(equal, len(numbers) - index, 0, number))
    program.append(_Filter(give, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    program.append(_Filter(give, 0, 0, 0x00050000 | errno))  # SECCOMP_RET_ERRNO
    filters = (_Filter * len(program))(*program)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    prog = _Program(len(program), filters)
    if libc.prctl(22, 2, ctypes.byref(prog), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
