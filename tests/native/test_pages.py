"""Page sizes as asked and as got, and the parsers that tell."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numagraft import native
from numagraft.errors import PlacementError
from numagraft.native import PlacedBuffer, Runtime
from numagraft.native.system import _native
from numagraft.runtime import RuntimeLayout, RuntimeNode

CPUS = tuple(sorted(os.sched_getaffinity(0)))
MIB = 1 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
POOL = Path("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages")


def runtime_with(pages: str) -> Runtime:
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("the kernel shows no node 0")
    return Runtime(RuntimeLayout((RuntimeNode(0, CPUS[:1], 1),), pages=pages))  # type: ignore[arg-type]


def test_small_pages_are_small_even_where_the_kernel_prefers_huge_ones() -> None:
    buffer = (runtime := runtime_with("4k")).allocate(8 * MIB, [0], owner="w")
    assert native.query_page_sizes(buffer.address, buffer.bytes) == {4096: 8 * MIB}
    del runtime


@pytest.mark.parametrize("pages", ["thp", "auto"])
def test_transparent_huge_pages_are_got_and_reported(pages: str) -> None:
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("the kernel gives no transparent huge pages")
    runtime = runtime_with(pages)
    buffer = runtime.allocate(64 * MIB, [0], owner="w")
    sizes = native.query_page_sizes(buffer.address, buffer.bytes)
    assert sizes.get(2 * MIB, 0) >= 56 * MIB, sizes  # a few may be missing on a fragmented machine
    assert sum(sizes.values()) == 64 * MIB
    assert runtime.memory_report()[0].page_bytes == sizes


@pytest.fixture
def huge_pages() -> int:
    """Explicit huge pages for this test, where it may reserve them."""
    if not POOL.exists() or not os.access(POOL, os.W_OK):
        pytest.skip("cannot reserve huge pages here")
    before = POOL.read_text()
    POOL.write_text("8")
    got = int(POOL.read_text())
    if got < 8:
        POOL.write_text(before)
        pytest.skip(f"only {got} huge pages to be had")
    yield got
    POOL.write_text(before)


def test_explicit_huge_pages(huge_pages: int) -> None:
    runtime = runtime_with("2m")
    small = [runtime.allocate(4096, [0], owner=f"w{i}") for i in range(10)]
    large = runtime.allocate(5 * MIB, [0], owner="large")
    (arena,) = runtime.memory_report()
    assert (arena.pages, arena.page_bytes) == ("2m", {2 * MIB: 6 * MIB})
    assert sum(pages.per_node[0] for pages in runtime.verify([PlacedBuffer.of(b) for b in (*small, large)])) == 1290
    with pytest.raises(PlacementError) as caught:
        runtime.allocate(40 * MIB, [0], owner="experts")
    assert "experts needs 20 huge pages of 2.0 MiB on node 0, which has 5 free" in str(caught.value)
    assert f"echo 23 > {POOL}" in str(caught.value)
    fill = runtime.allocate(10 * MIB, [0], owner="fill")  # from the middle of a page: takes five more
    late = runtime.allocate(4096, [0], owner="needs no page of its own")
    runtime.release(late)
    runtime.release(fill)
    runtime.release(large)

    again = runtime.allocate(5 * MIB, [0], owner="again")
    assert not any(ctypes.string_at(again.address, again.bytes))


@pytest.mark.parametrize(("pages", "size"), [("2m", "2.0 MiB"), ("1g", "1.0 GiB")])
def test_explicit_huge_pages_that_are_not_there(pages: str, size: str) -> None:
    runtime = runtime_with(pages)
    with pytest.raises(PlacementError, match=f"huge pages of {size}") as caught:
        runtime.allocate(1 << 38, [0], owner="w")
    assert "nr_hugepages" in str(caught.value) or "boot with" in str(caught.value)
    assert runtime.memory_report() == []


def test_one_question_per_huge_page() -> None:
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("the kernel gives no transparent huge pages")
    runtime = runtime_with("thp")
    buffer = runtime.allocate(1024 * MIB, [0], owner="w")
    if native.query_page_sizes(buffer.address, buffer.bytes) != {2 * MIB: 1024 * MIB}:
        pytest.skip("the machine is fragmented")
    counts, asked = runtime.native.verify([(buffer.address, buffer.bytes)])
    assert (counts[0].per_node, asked) == ({0: 262_144}, 512)
    small = runtime_with("4k")
    buffer = small.allocate(8 * MIB, [0], owner="w")
    assert small.native.verify([(buffer.address, buffer.bytes)])[1] == 2048


SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                3072 kB
AnonHugePages:      2048 kB
Private_Hugetlb:       0 kB
7f0000400000-7f0000c00000 rw-p 00000000 00:0f 123 /anon_hugepage (deleted)
Size:               8192 kB
KernelPageSize:     2048 kB
Rss:                   0 kB
AnonHugePages:         0 kB
Private_Hugetlb:    4096 kB
"""


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0x7F0000000000, 0x7F0000C00000, {4096: MIB, 2 * MIB: 6 * MIB}),
        (0x7F0000000000, 0x7F0000400000, {4096: MIB, 2 * MIB: 2 * MIB}),
        (0x7F0000400000, 0x7F0000C00000, {2 * MIB: 4 * MIB}),
        (0x7F0000000000, 0x7F0000180000, {4096: MIB // 2, 2 * MIB: MIB}),
        (0x7E0000000000, 0x7E0000001000, {}),
    ],
)
def test_sizes_from_smaps(begin: int, end: int, expected: dict[int, int]) -> None:
    assert _native.page_sizes_in_smaps(SMAPS, begin, end) == expected


NUMA_MAPS = """\
7f0000000000 bind:0 anon=1024 dirty=1024 N0=1024 kernelpagesize_kB=4
7f0000400000 interleave:0-1 file=/anon_hugepage\\040(deleted) huge anon=4 dirty=4 N0=2 N1=2 kernelpagesize_kB=2048
7f0000c00000 default
"""
MAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000400000-7f0000c00000 rw-p 00000000 00:0f 123 /anon_hugepage (deleted)
7f0000c00000-7f0000c02000 rw-p 00000000 00:00 0
"""


@pytest.mark.parametrize(
    ("begin", "end", "per_node", "absent", "exact", "method"),
    [
        (0x7F0000000000, 0x7F0000400000, {0: 1024}, 0, True, "numa_maps"),
        (0x7F0000001000, 0x7F0000003000, {0: 2}, 0, True, "numa_maps"),  # part of a mapping that lies on one node
        (0x7F0000400000, 0x7F0000C00000, {0: 1024, 1: 1024}, 0, True, "numa_maps"),
        (0x7F0000400000, 0x7F0000600000, {0: 1024, 1: 1024}, 0, False, "numa_maps"),  # part of a mixed one
        (0x7F0000C00000, 0x7F0000C02000, {}, 2, True, "numa_maps"),
        (0x7F0000C00000, 0x7F0000C01000, {}, 0, False, "numa_maps"),
        (0x7F0000000000, 0x7F0000C00000, {0: 2048, 1: 1024}, 0, True, "numa_maps"),
        (0x7E0000000000, 0x7E0000001000, {}, 0, False, "unverifiable"),
        (0x7F0000C01000, 0x7F0000C03000, {}, 0, False, "numa_maps"),  # reaches where nothing is mapped
    ],
)
def test_nodes_from_numa_maps(
    begin: int, end: int, per_node: dict[int, int], absent: int, exact: bool, method: str
) -> None:
    count = _native.count_in_numa_maps(NUMA_MAPS, MAPS, begin, end)
    assert (count.per_node, count.absent, count.exact, count.method) == (per_node, absent, exact, method)


@given(st.text(max_size=300), st.text(max_size=300))
def test_parsers_survive_garbage(first: str, second: str) -> None:
    _native.page_sizes_in_smaps(first, 0, 1 << 47)
    _native.count_in_numa_maps(first, second, 4096, 1 << 30)
    _native.parse_zoneinfo(first, 4096)


def test_memory_that_was_never_touched_is_absent() -> None:
    with mmap.mmap(-1, 16 * 4096) as memory:
        memory[0] = 1
        memory[5 * 4096] = 1
        hold = ctypes.c_char.from_buffer(memory)
        count = native.query_pages(ctypes.addressof(hold), 16 * 4096)
        del hold
    assert sum(count.per_node.values()) == 2
    assert count.absent == 14
