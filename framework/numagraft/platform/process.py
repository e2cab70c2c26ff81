"""What this process may use: affinity, allowed memory nodes, inherited memory policy, resource limits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform as _uname
from dataclasses import dataclass, field

from numagraft.platform.facts import MemoryPolicy
from numagraft.platform.ids import parse_int, parse_list, parse_mask
from numagraft.platform.tree import Tree

_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236, "riscv64": 236, "ppc64le": 260}
_MODES = ("default", "preferred", "bind", "interleave", "local", "preferred_many", "weighted_interleave")
_MODE_FLAGS = 0xE000  # MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES | MPOL_F_NUMA_BALANCING
_NODE_BITS = 4096


@dataclass(frozen=True)
class Allowance:
    """None: nothing is known, everything is allowed."""

    cpus: tuple[int, ...] | None = None
    nodes: tuple[int, ...] | None = None
    policy: MemoryPolicy = field(default_factory=MemoryPolicy)
    memlock_bytes: int | None = None  # None: unlimited or not known
    seccomp: int | None = None  # 2: a filter is installed
    capabilities: int | None = None  # the effective set, a bit mask


def read_allowance(tree: Tree) -> Allowance:
    """/proc/self/status is the truth about allowed nodes: inside a cpuset, /sys goes on showing the whole machine."""
    fields = {}
    for line in (tree.read("/proc/self/status") or "").splitlines():
        key, _, value = line.partition(":")
        fields[key] = value.strip()
    cpus = parse_list(fields.get("Cpus_allowed_list")) or parse_mask(fields.get("Cpus_allowed"))
    nodes = parse_list(fields.get("Mems_allowed_list")) or parse_mask(fields.get("Mems_allowed"))
    if tree.live:
        # The calling thread's own mask: the main thread's in status may differ.
        with contextlib.suppress(OSError):
            cpus = tuple(sorted(os.sched_getaffinity(0)))
    capabilities = fields.get("CapEff", "")
    return Allowance(
        cpus=cpus or None,
        nodes=nodes or None,
        policy=inherited_policy() if tree.live else _policy_of_maps(tree),
        memlock_bytes=_memlock(tree.read("/proc/self/limits")),
        seccomp=parse_int(fields.get("Seccomp")),
        capabilities=int(capabilities, 16) if _is_hex(capabilities) else None,
    )


def inherited_policy() -> MemoryPolicy:
    """The calling thread's memory policy, asked of the kernel."""
    number = _GET_MEMPOLICY.get(_uname.machine())
    if number is None:
        return MemoryPolicy("unknown", note=f"no get_mempolicy known for {_uname.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_int(0)
    mask = (ctypes.c_ulong * (_NODE_BITS // 64))()
    # maxnode counts one more than the bits it means.
    result = libc.syscall(
        ctypes.c_long(number),
        ctypes.byref(mode),
        mask,
        ctypes.c_ulong(_NODE_BITS + 1),
        ctypes.c_void_p(None),
        ctypes.c_ulong(0),
    )
    if result != 0:
        code = ctypes.get_errno()
        return MemoryPolicy("unknown", note=f"get_mempolicy: {errno.errorcode.get(code, code)}")
    index = mode.value & ~_MODE_FLAGS
    name = _MODES[index] if 0 <= index < len(_MODES) else "unknown"
    nodes = tuple(word * 64 + bit for word, bits in enumerate(mask) for bit in range(64) if bits >> bit & 1)
    if name == "preferred" and not nodes:
        name = "local"
    return MemoryPolicy(name, nodes)


def _policy_of_maps(tree: Tree) -> MemoryPolicy:
    """The policy in the first line of numa_maps, which shows the task's where a mapping has none of its own."""
    words = (tree.read("/proc/self/numa_maps", 4096) or "").split()
    if len(words) < 2:
        return MemoryPolicy("unknown", note="not in the dump")
    name, _, nodes = words[1].partition(":")
    name = name.partition("=")[0]
    name = {"prefer": "preferred"}.get(name, name)
    return MemoryPolicy(name if name in _MODES else "unknown", parse_list(nodes) or ())


def _memlock(text: str | None) -> int | None:
    for line in (text or "").splitlines():
        if line.startswith("Max locked memory"):
            words = line[len("Max locked memory") :].split()
            return parse_int(words[0]) if words else None
    return None


def _is_hex(text: str) -> bool:
    return 0 < len(text) <= 32 and all(character in "0123456789abcdefABCDEF" for character in text)
