"""The kernel's own answers, by raw system calls: what the tests judge numagraft by, so it must share no code with it."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import platform
import re
import select
import signal
import struct
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
MIB = 1 << 20
DEFAULT, PREFERRED, BIND, INTERLEAVE = range(4)  # linux/mempolicy.h
NUMBERS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "migrate_pages": 256, "move_pages": 279},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239},
}[platform.machine()]
MASK_BITS = 1024
NODES = Path("/sys/devices/system/node")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *arguments: Any) -> int:
    cooked = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _libc.syscall(ctypes.c_long(NUMBERS[name]), *cooked)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)


def _mask(nodes: Iterable[int]) -> Any:
    words = (ctypes.c_ulong * (MASK_BITS // 64))()
    for node in nodes:
        words[node // 64] |= 1 << (node % 64)
    return words


def mbind(address: int, size: int, mode: int, nodes: Iterable[int], flags: int = 0) -> None:
    # the kernel takes one bit less than maxnode says
    _call("mbind", address, size, mode, _mask(nodes), MASK_BITS + 1, flags)


def set_mempolicy(mode: int, nodes: Iterable[int] = ()) -> None:
    nodes = tuple(nodes)
    _call("set_mempolicy", mode, _mask(nodes) if nodes else None, MASK_BITS + 1 if nodes else 0)


def get_mempolicy() -> tuple[int, frozenset[int]]:
    """Mode and nodes of this thread's policy."""
    mode, mask = ctypes.c_int(), _mask(())
    _call("get_mempolicy", ctypes.byref(mode), mask, MASK_BITS, 0, 0)
    return mode.value, frozenset(n for n in range(MASK_BITS) if mask[n // 64] >> (n % 64) & 1)


def page_nodes(address: int, size: int, *, step: int = PAGE) -> list[int]:
    """The node of every page (or of one page per `step` bytes) of [address, address + size); negative: an errno."""
    first = address - address % PAGE
    count = -(-(address + size - first) // step)
    pages = (ctypes.c_void_p * count)(*range(first, first + count * step, step))
    status = (ctypes.c_int * count)()
    _call("move_pages", 0, count, pages, None, status, 0)
    return list(status)


def pages_by_node(address: int, size: int) -> dict[int, int]:
    """Kernel node id -> pages; negative ids count pages that are not there."""
    return dict(sorted(Counter(page_nodes(address, size)).items()))


def page_sizes(address: int, size: int) -> dict[int, int]:
    """Page size -> bytes of the mappings that hold [address, address + size), from smaps: explicit huge pages have a mapping's
    KernelPageSize, transparent ones are AnonHugePages."""
    found: dict[int, int] = {}
    for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        begin, end = (int(word, 16) for word in text.split(maxsplit=1)[0].split("-"))
        if end <= address or begin >= address + size:
            continue
        fields = {name: int(value) << 10 for name, value in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
        explicit = fields["Private_Hugetlb"] + fields["Shared_Hugetlb"]
        counts = ((fields["KernelPageSize"], explicit), (2 * MIB, fields["AnonHugePages"]))
        for page, amount in (*counts, (PAGE, fields["Rss"] - fields["AnonHugePages"])):
            if amount:
                found[page] = found.get(page, 0) + amount
    return found


def getcpu() -> tuple[int, int]:
    """(cpu, node) this thread runs on."""
    cpu, node = ctypes.c_uint(), ctypes.c_uint()
    _libc.getcpu(ctypes.byref(cpu), ctypes.byref(node))
    return cpu.value, node.value


@contextmanager
def anonymous(size: int) -> Iterator[int]:
    """The address of fresh, untouched private memory."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(area)
    try:
        yield ctypes.addressof(view)
    finally:
        del view
        area.close()


def touch(address: int, size: int) -> None:
    ctypes.memset(address, 1, size)


@contextmanager
def filled(node: int, *, leave: int) -> Iterator[None]:
    """A node that can give at most about `leave` bytes more, however hard the kernel tries: the rest is reserved as huge
    pages, which it need not clear, and what is too scattered for those is touched."""
    file = NODES / f"node{node}/hugepages/hugepages-2048kB/nr_hugepages"
    before = int(file.read_text())
    with ExitStack() as undo:
        undo.callback(file.write_text, str(before))
        for _ in range(4):
            Path("/proc/sys/vm/drop_caches").write_text("3")
            free, reclaimable = node_room(node)
            if free + reclaimable < leave + 4 * MIB:
                break
            file.write_text(str(int(file.read_text()) + (free + reclaimable - leave) // (2 * MIB)))
        free, reclaimable = node_room(node)
        scattered = min(free, free + reclaimable - leave) // PAGE * PAGE
        if scattered >= 4 * MIB:
            address = undo.enter_context(anonymous(scattered))
            mbind(address, scattered, BIND, [node])
            touch(address, scattered)
        room = sum(node_room(node))
        assert room < leave + 8 * MIB, f"node {node} was to be left {leave >> 20} MiB and has {room >> 20}"
        yield


@contextmanager
def pinned(cpus: Iterable[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse_list(text: str) -> tuple[int, ...]:
    """A sysfs list: "0-2,5"."""
    spans = [part.split("-") for part in text.strip().split(",") if part.strip()]
    return tuple(i for span in spans for i in range(int(span[0]), int(span[-1]) + 1))


def node_free(node: int) -> int:
    """Free bytes of a node."""
    found = re.search(r"MemFree:\s+(\d+) kB", (NODES / f"node{node}/meminfo").read_text())
    assert found
    return int(found.group(1)) << 10


def node_room(node: int) -> tuple[int, int]:
    """Bytes of a node that are free above what its zones keep for the kernel ("low" and the largest "protection"), and
    bytes that might be reclaimed (file pages, mapped ones too, and slabs): an upper bound."""
    free = reclaimable = 0
    for zone in Path("/proc/zoneinfo").read_text().split("Node ")[1:]:
        if not zone.startswith(f"{node},"):
            continue
        numbers = {name: int(value) for name, value in re.findall(r"^ +([a-z_ ]+?) +(\d+)$", zone, re.MULTILINE)}
        reclaimable += sum(numbers.get(f"nr_{kind}", 0) for kind in ("active_file", "inactive_file", "slab_reclaimable"))
        kept = re.search(r"protection: \(([\d, ]+)\)", zone)
        if kept:
            reserve = numbers["low"] + max(map(int, kept.group(1).split(",")))
            free += max(0, numbers["pages free"] - reserve)
    return free * PAGE, reclaimable * PAGE


def thread_cpus() -> dict[int, frozenset[int]]:
    """Thread id -> CPUs it may run on, for every thread of this process."""
    masks = {}
    for task in Path("/proc/self/task").iterdir():
        found = re.search(r"Cpus_allowed_list:\s*(\S+)", (task / "status").read_text())
        assert found
        masks[int(task.name)] = frozenset(parse_list(found.group(1)))
    return masks


def refuse(*calls: str, errno: int) -> None:
    """From now on the kernel answers `errno` to these system calls of this thread and its children, as a container's
    seccomp filter does. It cannot be taken back: call it in a child."""
    load, jump_equal, give_back = 0x20, 0x15, 0x06  # linux/bpf_common.h
    allow, fail = 0x7FFF0000, 0x00050000 | errno  # linux/seccomp.h
    program = [(load, 0, 0, 0)]  # seccomp_data.nr
    for call in calls:
        program += [(jump_equal, 0, 1, NUMBERS[call]), (give_back, 0, 0, fail)]
    program.append((give_back, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if _libc.prctl(22, 2, ctypes.byref(header), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


class ChildKilled(Exception):
    """A child ended by a signal; `signal` is its name."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(self.signal)


def in_child(work: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Runs `work` in a forked child and returns what it returns; an exception there is raised here.

    The child is the first to go when memory runs out. Raises ChildKilled, TimeoutError. A fork costs a few milliseconds in
    the guest, a new interpreter a second.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _child(work, writer)
    os.close(writer)
    answer = bytearray()
    deadline = time.monotonic() + seconds
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while True:
            if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise TimeoutError(f"the child was still running after {seconds} s")
            chunk = stream.read(65536)
            if not chunk:
                break
            answer += chunk
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildKilled(os.WTERMSIG(status))
    kind, value = pickle.loads(bytes(answer))
    if kind == "raised":
        error, text = value
        raise error from RuntimeError(f"in the child:\n{text}")
    return value


def _child(work: Callable[[], Any], writer: int) -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
        answer: tuple[str, Any] = ("returned", work())
        data = pickle.dumps(answer)
    except BaseException as error:
        text = traceback.format_exc()
        try:
            data = pickle.dumps(("raised", (error, text)))
            pickle.loads(data)
        except Exception:  # not every exception can be pickled
            data = pickle.dumps(("raised", (RuntimeError(f"{type(error).__name__}: {error}"), text)))
    with os.fdopen(writer, "wb") as stream:
        stream.write(data)
    os._exit(0)
