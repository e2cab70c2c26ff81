"""Arenas: contents, mappings, giving back, and every way in which the system can refuse."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numagraft import native
from numagraft.errors import NumagraftError, PlacementError
from numagraft.native import PlacedBuffer, Runtime
from numagraft.runtime import RuntimeLayout, RuntimeNode

CPUS = tuple(sorted(os.sched_getaffinity(0)))
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    for call in native.system.CALLS:
        native.set_fault(call, None)
    native.plant_available(None)


def one_node(*, pages: str = "auto") -> Runtime:
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("the kernel shows no node 0")
    return Runtime(RuntimeLayout((RuntimeNode(0, CPUS[:1], 1),), pages=pages))  # type: ignore[arg-type]


def two_nodes() -> Runtime:
    """Two runtime nodes on kernel node 0, each with a CPU of its own."""
    if len(CPUS) < 2 or not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("needs node 0 and two CPUs")
    return Runtime(RuntimeLayout((RuntimeNode(0, CPUS[:1], 1), RuntimeNode(0, CPUS[1:2], 1))))


def anonymous_kib() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def contents(buffer: object) -> bytes:
    return ctypes.string_at(buffer.address, buffer.bytes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("interleaved", [False, True])
def test_memory_is_zeroed_resident_and_where_it_was_asked(interleaved: bool) -> None:
    runtime = two_nodes()
    buffer = runtime.allocate(5 * MIB + 1, [0, 1] if interleaved else [1], interleaved=interleaved, owner="w")
    assert buffer.bytes == 5 * MIB + 4096
    assert buffer.address % 4096 == 0
    pages = native.query_pages(buffer.address, buffer.bytes)
    assert (pages.per_node, pages.absent, pages.method, pages.exact) == (
        {0: buffer.bytes // 4096},
        0,
        "move_pages",
        True,
    )
    assert not any(contents(buffer))


def test_memory_given_back_comes_again_as_zeros() -> None:
    runtime = one_node()
    keep = runtime.allocate(4096, [0], owner="keep")
    first = runtime.allocate(3 * MIB, [0], owner="first")
    address = first.address
    ctypes.memset(address, 0xFF, first.bytes)
    runtime.release(first)
    again = runtime.allocate(3 * MIB, [0], owner="again")
    assert again.address == address
    assert not any(contents(again))
    runtime.release(keep)


def test_memory_returns_to_the_system() -> None:
    runtime = one_node()
    runtime.observe_workers()
    before = anonymous_kib()
    buffer = runtime.allocate(256 * MIB, [0], owner="large")
    assert anonymous_kib() - before > 250 * 1024
    runtime.release(buffer)
    assert anonymous_kib() - before < 2 * 1024
    assert runtime.memory_report() == []
    buffer = runtime.allocate(64 * MIB, [0], owner="dies with its runtime")
    del runtime
    assert anonymous_kib() - before < 2 * 1024


def test_releasing_twice_or_elsewhere_is_refused() -> None:
    runtime, other = one_node(), one_node()
    keep = runtime.allocate(4096, [0], owner="keep")
    buffer = runtime.allocate(4096, [0], owner="w")
    with pytest.raises(ValueError, match="does not belong to this runtime"):
        other.release(buffer)
    runtime.release(buffer)
    with pytest.raises(ValueError, match="already given back"):
        runtime.release(buffer)
    assert keep.bytes == 4096


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300_000), st.booleans()), min_size=1, max_size=40))
def test_buffers_never_overlap(script: list[tuple[int, bool]]) -> None:
    runtime = Runtime(RuntimeLayout.virtual(1))
    live: list[object] = []
    for number, (bytes_, drop) in enumerate(script):
        buffer = runtime.allocate(bytes_, [0], owner=str(number))
        assert not any(contents(buffer))
        ctypes.memset(buffer.address, number % 255 + 1, buffer.bytes)
        live.append((buffer, number % 255 + 1))
        if drop:
            runtime.release(live.pop(len(live) // 2)[0])  # type: ignore[index]
        for each, mark in live:  # type: ignore[misc]
            assert set(contents(each)) == {mark}
        report = runtime.memory_report()
        assert sum(arena.used_bytes for arena in report) == sum(each.bytes for each, _ in live)  # type: ignore[misc]


def test_ten_thousand_weights_take_few_mappings() -> None:
    runtime = two_nodes()
    before = mappings()
    for number in range(10_000):
        runtime.allocate(4096 + number % 3 * 4096, [number % 2], owner=f"w{number}")
    assert mappings() - before < 200
    report = runtime.memory_report()
    assert sum(arena.buffers for arena in report) == 10_000
    assert len(report) <= 8


def test_report_names_arenas_and_page_sizes() -> None:
    runtime = one_node(pages="4k")
    runtime.allocate(8 * MIB, [0], owner="w")
    (arena,) = runtime.memory_report()
    assert (arena.used_bytes, arena.buffers, arena.os_nodes, arena.obtained, arena.refused, arena.pages) == (
        8 * MIB,
        1,
        (0,),
        "mbind",
        "",
        "4k",
    )
    assert arena.page_bytes == {4096: 8 * MIB}


def test_verifying_tells_the_operators_where_pages_are() -> None:
    runtime = one_node()
    buffer = runtime.allocate(MIB, [0], owner="w")
    assert not buffer.verified
    assert buffer.remote_bytes(0, MIB, 1) == 0  # unknown is not remote
    (count,) = runtime.verify([PlacedBuffer.of(buffer)])
    assert count.per_node == {0: 256}
    assert (buffer.node_at(0), buffer.node_at(MIB - 1)) == (0, 0)
    assert (buffer.remote_bytes(0, MIB, 0), buffer.remote_bytes(100, 5000, 1)) == (0, 4900)
    with pytest.raises(ValueError, match="no buffer of this runtime starts"):
        runtime.verify([PlacedBuffer(buffer.address + 4096, 4096, (0,), False, "inside")])


@settings(max_examples=200)
@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=20),
    st.integers(0, 80_000),
    st.integers(0, 80_000),
    st.integers(0, 4),
)
def test_remote_bytes_are_those_on_other_nodes(nodes: list[int], begin: int, end: int, node: int) -> None:
    residency = native.system._native.Residency()
    residency.store(nodes, 4096)
    size = len(nodes) * 4096
    begin, end = min(begin, size) // 512 * 512, min(end, size) // 512 * 512
    expected = sum(512 for offset in range(begin, end, 512) if 0 <= nodes[offset // 4096] != node)
    assert residency.remote_bytes(begin, end, node) == expected
    assert residency.node_at(begin) == (nodes[begin // 4096] if begin < size else residency.node_at(size))


REFUSED = ("mbind", "set_mempolicy", "get_mempolicy", "move_pages")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("refused", "obtained", "method"),
    [
        (("mbind",), "set_mempolicy", "move_pages"),
        (("mbind", "set_mempolicy"), "first_touch", "move_pages"),
        (("mbind", "get_mempolicy"), "first_touch", "move_pages"),
        (("move_pages",), "mbind", "numa_maps"),
        (REFUSED, "first_touch", "numa_maps"),
        ((*REFUSED, "numa_maps"), "first_touch", "unverifiable"),
        ((*REFUSED, "madvise"), "first_touch", "numa_maps"),
    ],
)
def test_refused_calls_end_in_another_way_that_is_listed(
    refused: tuple[str, ...], obtained: str, method: str, interleaved: bool
) -> None:
    runtime = two_nodes()
    for call in refused:
        native.set_fault(call, errno.EPERM)
    nodes = [0, 1] if interleaved else [1]
    small = runtime.allocate(12_288, nodes, interleaved=interleaved, owner="small")
    buffer = runtime.allocate(5 * MIB, nodes, interleaved=interleaved, owner="w")
    (count,) = runtime.verify([PlacedBuffer.of(buffer)])
    assert count.method == method
    assert count.exact == buffer.verified == (method != "unverifiable")
    if method != "unverifiable":
        assert count.per_node == {0: 1280}
        assert (count.absent, buffer.node_at(4096)) == (0, 0)
    (arena,) = runtime.memory_report()
    assert (arena.obtained, arena.refused) == (obtained, "EPERM" if "mbind" in refused else "")
    assert not any(contents(buffer)) and not any(contents(small))
    for call in refused:
        native.set_fault(call, None)
    assert native.query_pages(small.address, small.bytes).absent == 0


def test_memory_only_node_without_any_policy_call_is_an_error() -> None:
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("the kernel shows no node 0")
    runtime = Runtime(RuntimeLayout((RuntimeNode(0, CPUS[:1], 1), RuntimeNode(0, (), 0))))
    buffer = runtime.allocate(MIB, [1], owner="w")  # node 0's thread touches it under the mapping's policy
    assert native.query_pages(buffer.address, buffer.bytes).absent == 0
    runtime.release(buffer)
    for call in REFUSED:
        native.set_fault(call, errno.EPERM)
    with pytest.raises(PlacementError, match=r"w: memory of a node without threads.*\n.*SYS_NICE"):
        runtime.allocate(MIB, [1], owner="w")
    assert runtime.memory_report() == []


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("mbind", errno.EINVAL, r"mbind to node 0 says EINVAL.*\n.*detect the platform again"),
        ("mbind", errno.ENOMEM, r"mbind to node 0 says ENOMEM.*\n.*vm.max_map_count"),
        ("mmap", errno.ENOMEM, r"cannot reserve 64.0 MiB of address space: mmap says ENOMEM.*\n.*ulimit -v"),
        ("mmap", errno.EAGAIN, r"mmap says EAGAIN.*\n.*ulimit -l"),
        ("madvise", errno.ENOMEM, r"touching memory failed: madvise says ENOMEM.*\n"),
        ("madvise", errno.EFAULT, r"madvise says EFAULT.*\n"),
        (
            "sched_setaffinity",
            errno.EINVAL,
            r"cannot pin a thread to CPU \d+: sched_setaffinity says EINVAL.*\n.*offline",
        ),
        ("sched_setaffinity", errno.EPERM, r"sched_setaffinity says EPERM.*\n.*sandbox"),
    ],
)
def test_what_cannot_be_placed_is_an_error_with_its_remedy(call: str, code: int, message: str) -> None:
    runtime = two_nodes()
    before = anonymous_kib()
    native.set_fault(call, code)
    with pytest.raises(PlacementError, match=message):
        runtime.allocate(64 * MIB, [1], owner="w")
    assert runtime.memory_report() == []
    native.set_fault(call, None)
    assert anonymous_kib() - before < 2 * 1024
    assert runtime.allocate(MIB, [1], owner="w").bytes == MIB  # and it works when the system does


def test_arenas_grow_so_that_they_stay_few() -> None:
    runtime = one_node()
    runtime.allocate(60 * MIB, [0], owner="fills the first arena")
    runtime.allocate(60 * MIB, [0], owner="second")
    first, second = runtime.memory_report()
    assert second.reserved_bytes == 2 * first.reserved_bytes


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_full_node_is_an_error_before_anything_is_touched(interleaved: bool) -> None:
    runtime = two_nodes()
    before = anonymous_kib()
    native.plant_available(100 * MIB)
    with pytest.raises(PlacementError, match=r"experts needs .* MiB on node 0, which has 100.0 MiB left\n.*`shard`"):
        runtime.allocate(400 * MIB, [0, 1] if interleaved else [0], interleaved=interleaved, owner="experts")
    assert anonymous_kib() - before < 1024
    runtime.allocate(16 * MIB, [0], owner="small")


def test_a_copy_on_two_nodes_needs_the_room_of_both() -> None:
    runtime = two_nodes()
    native.plant_available(100 * MIB)
    with pytest.raises(PlacementError, match=r"w needs 120.0 MiB on node 0, which has 100.0 MiB left"):
        runtime.allocate(120 * MIB, [0, 1], owner="w")  # both are kernel node 0 here
    runtime.allocate(50 * MIB, [0, 1], owner="w")


def test_a_node_that_fills_up_half_way_is_an_error_and_gives_back() -> None:
    runtime = one_node()
    before = anonymous_kib()
    native.plant_available(100 * MIB, after=1)
    with pytest.raises(PlacementError, match=r"experts \(while its memory was being filled\) needs"):
        runtime.allocate(512 * MIB, [0], owner="experts")
    native.plant_available(None)
    assert anonymous_kib() - before < 2 * 1024
    assert runtime.memory_report() == []
    assert runtime.allocate(512 * MIB, [0], owner="experts").bytes == 512 * MIB


def test_far_more_than_the_machine_has_is_refused() -> None:
    for runtime, place in ((one_node(), "node 0"), (Runtime(RuntimeLayout.virtual(2)), "this machine")):
        with pytest.raises(PlacementError, match=f"needs 8.0 TiB on {place}, which has "):
            runtime.allocate(8 << 40, [0], owner="huge")


@pytest.mark.parametrize("bytes_", [0, 1 << 60])
def test_sizes_that_make_no_sense(bytes_: int) -> None:
    with pytest.raises(ValueError, match="cannot allocate"):
        Runtime(RuntimeLayout.virtual(1)).allocate(bytes_, [0], owner="w")


def test_a_kernel_node_that_does_not_exist() -> None:
    runtime = Runtime(RuntimeLayout((RuntimeNode(0, CPUS[:1], 1), RuntimeNode(1023, (), 0))))
    with pytest.raises(NumagraftError, match="node 1023"):
        runtime.allocate(MIB, [1], owner="w")
