"""What this process may do: each system call that placement rests on, tried for real. Imports no torch."""

from __future__ import annotations

import errno as errno_numbers
from dataclasses import dataclass

from numagraft import _native

#: What `set_fault` can make fail.
CALLS = ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "sched_setaffinity", "mmap", "madvise", "numa_maps")


@dataclass(frozen=True)
class Probe:
    """The errno's name for each call that failed ("EPERM" under Docker's default seccomp filter), None where it worked.

    `mbind` is "misplaced" when the call worked and the page lies elsewhere.
    """

    mbind: str | None
    set_mempolicy: str | None
    get_mempolicy: str | None
    move_pages: str | None
    sched_setaffinity: str | None

    @property
    def refused(self) -> dict[str, str]:
        """The calls that failed, and how."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class InheritedPolicy:
    """The memory policy of the calling thread (`numactl --interleave=all` sets one); `mode` is "" when it cannot be asked."""

    mode: str
    nodes: str


def binding_allowed() -> Probe:
    """Tries every call on one page, in a thread of its own, and undoes it.

    >>> binding_allowed().sched_setaffinity is None
    True
    """
    found = _native.probe_calls()
    calls = ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "sched_setaffinity")
    return Probe(**{call: found.get(call, found.get("mmap", "")) or None for call in calls})


def inherited_policy() -> InheritedPolicy:
    """The policy that memory touched by this thread follows where nothing else is said."""
    mode, nodes = _native.inherited_policy()
    return InheritedPolicy(mode, nodes)


def available_by_node() -> dict[int, int]:
    """Bytes each kernel node can give without swapping (free and reclaimable above the watermarks), as allocations check."""
    return _native.available_by_node()


def memory_cgroup_limit(root: str = "/") -> tuple[str, int, int] | None:
    """The tightest memory cgroup above this process: its limit's file, the limit, and what is left of it, in bytes."""
    return _native.tightest_cgroup_limit(root)


def set_fault(call: str, errno: int | None, *, after: int = 0) -> None:
    """Test seam: the named system call fails with `errno` from now on, once `after` more got through; None ends it.

    Raises ValueError for a call that is not in `CALLS`.
    """
    if errno is not None and errno not in errno_numbers.errorcode:
        raise ValueError(f"{errno} is not an errno")
    _native.set_fault(call, errno or 0, after)


def plant_available(bytes: int | None, *, after: int = 0) -> None:
    """Test seam: allocations see `bytes` available on every node, once `after` more looks went by; None ends it."""
    _native.plant_available(-1 if bytes is None else bytes, after)
