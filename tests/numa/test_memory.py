"""Arenas land where they are asked to, whatever policy the process inherited, and give everything back."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest

from numagraft import native
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout, RuntimeSettings

from . import syscalls
from .syscalls import BIND, INTERLEAVE, MIB, PAGE, PREFERRED, anonymous, in_child, mbind, pages_by_node, pinned, touch

pytestmark = pytest.mark.numa


def layout_of(*, pages: str = "4k", nodes: tuple[int, ...] | str = "all") -> RuntimeLayout:
    return RuntimeLayout.from_platform(Platform.detect(), RuntimeSettings(pages=pages, nodes=nodes))


@pytest.fixture(scope="module")
def runtime() -> native.Runtime:
    """All nodes that have memory, the memory-only ones too; 4 KiB pages."""
    return native.Runtime(layout_of(nodes=syscalls.parse_list((syscalls.NODES / "has_memory").read_text())))


def test_bound_memory_lies_on_its_node(runtime):
    for index, node in enumerate(runtime.layout.nodes):
        buffer = runtime.allocate(3 * MIB, nodes=(index,), owner="bound")
        assert pages_by_node(buffer.address, buffer.bytes) == {node.os_node: 3 * MIB // PAGE}
        assert bytes_at(buffer.address, 64) == bytes(64)
        runtime.release(buffer)


@pytest.mark.parametrize("count", [2, None])
def test_interleaved_memory_is_even(runtime, count):
    indices = tuple(range(len(runtime.layout.nodes)))[:count]
    if len(indices) < 2:
        pytest.skip("one node")
    # several buffers of one arena, of sizes that do not divide
    buffers = [runtime.allocate(size * PAGE, nodes=indices, interleaved=True, owner="spread") for size in (257, 3, 1000)]
    ids = {runtime.layout.nodes[i].os_node for i in indices}
    total: dict[int, int] = dict.fromkeys(ids, 0)
    for buffer in buffers:
        found = pages_by_node(buffer.address, buffer.bytes)
        assert set(found) <= ids
        assert max(found.get(i, 0) for i in ids) - min(found.get(i, 0) for i in ids) <= 1
        for node, pages in found.items():
            total[node] += pages
    assert max(total.values()) - min(total.values()) <= len(buffers)
    for buffer in buffers:
        runtime.release(buffer)


@pytest.mark.parametrize(("pages", "page"), [("4k", PAGE), ("thp", 2 * MIB)])
def test_a_large_interleaved_arena_is_even(full_nodes, pages, page):
    """48 MiB in odd pieces that fill their arena without gaps: a node more or less is 0.01 % of the small pages."""
    runtime = native.Runtime(layout_of(pages=pages))
    indices = tuple(range(len(runtime.layout.nodes)))
    sizes = (1537, 2048, 4099, 3, 4601)
    assert sum(sizes) == 48 * MIB // PAGE
    buffers = [runtime.allocate(n * PAGE, nodes=indices, interleaved=True, owner="spread") for n in sizes]
    (arena,) = (arena for arena in runtime.memory_report() if arena.interleaved)
    first = min(buffer.address for buffer in buffers)
    assert (arena.used_bytes, arena.address) == (48 * MIB, first)
    found = pages_by_node(first, 48 * MIB)
    assert set(found) == {runtime.layout.nodes[i].os_node for i in indices}
    assert max(found.values()) - min(found.values()) <= page // PAGE, "one page per arena"
    if page == PAGE:
        assert max(found.values()) - min(found.values()) <= 0.01 * sum(found.values())
    # A THP that was not to be had is several small pages, which is no fault of the spread.
    assert syscalls.page_sizes(first, 48 * MIB).get(page, 0) >= 40 * MIB


def test_transparent_huge_pages_land_too(usable_nodes):
    runtime = native.Runtime(layout_of(pages="thp"))
    for index, node in enumerate(runtime.layout.nodes):
        buffer = runtime.allocate(8 * MIB, nodes=(index,), owner="thp")
        assert pages_by_node(buffer.address, buffer.bytes) == {node.os_node: 8 * MIB // PAGE}
        assert native.query_page_sizes(buffer.address, buffer.bytes) == {2 * MIB: 8 * MIB}
        runtime.release(buffer)


def test_the_page_query_agrees_with_the_kernel(memory_nodes):
    first, last = memory_nodes[0], memory_nodes[-1]
    with anonymous(MIB) as address:
        mbind(address, MIB // 4, BIND, [first])
        mbind(address + MIB // 4, MIB // 4, BIND, [last])
        touch(address, MIB // 2)
        found = native.query_pages(address, MIB)
        kernel = pages_by_node(address, MIB)
        assert found.method == "move_pages" and found.page_bytes == PAGE
        assert found.per_node == {node: pages for node, pages in kernel.items() if node >= 0}
        assert found.absent == MIB // 2 // PAGE


@pytest.mark.parametrize(
    ("mode", "who"), [(INTERLEAVE, "all"), (BIND, "first"), (BIND, "last"), (PREFERRED, "last")]
)
def test_an_inherited_policy_does_not_change_where_weights_go(usable_nodes, mode, who):
    chosen = {"all": usable_nodes, "first": usable_nodes[:1], "last": usable_nodes[-1:]}[who]

    def placed() -> list[tuple[int | None, dict[int, int]]]:
        syscalls.set_mempolicy(mode, chosen)
        runtime = native.Runtime(layout_of())
        found = []
        for index, node in enumerate(runtime.layout.nodes):
            buffer = runtime.allocate(MIB, nodes=(index,), owner="bound")
            found.append((node.os_node, pages_by_node(buffer.address, buffer.bytes)))
        # the policy is the caller's own affair and stays
        assert syscalls.get_mempolicy() == (mode, frozenset(chosen))
        return found

    for node, found in in_child(placed):
        assert found == {node: MIB // PAGE}


def test_scratch_memory_is_local_to_its_worker(runtime, usable_nodes):
    compute = tuple(i for i, node in enumerate(runtime.layout.nodes) if node.threads)
    places = {place.rank: place.os_node for place in runtime.observe_workers(compute)}
    for rank, address in runtime.native.scratch_of_workers(list(compute), 256 << 10).items():
        assert pages_by_node(address, 256 << 10) == {places[rank]: (256 << 10) // PAGE}


def test_released_memory_goes_back_to_its_node(runtime):
    index = len(runtime.layout.nodes) - 1
    node = runtime.layout.nodes[index].os_node
    before = syscalls.node_free(node)
    buffer = runtime.allocate(128 * MIB, nodes=(index,), owner="large")
    during = syscalls.node_free(node)
    runtime.release(buffer)
    # each CPU keeps a list of some megabytes of free pages that count as used
    assert before - during > 96 * MIB
    assert before - syscalls.node_free(node) < 32 * MIB


def test_a_runtime_that_goes_takes_its_memory_along(usable_nodes):
    def leftover() -> int:
        runtime = native.Runtime(layout_of())
        before = syscalls.node_free(usable_nodes[-1])
        buffer = runtime.allocate(64 * MIB, nodes=(len(runtime.layout.nodes) - 1,), owner="large")
        del buffer, runtime
        return before - syscalls.node_free(usable_nodes[-1])

    assert in_child(leftover) < 32 * MIB


@pytest.mark.parametrize("pages", ["4k", "thp"])
def test_a_policy_that_others_left_does_not_place_the_next_owner(full_nodes, pages):
    runtime = native.Runtime(layout_of(pages=pages))
    right, wrong = full_nodes[0], full_nodes[-1]
    keeper = runtime.allocate(2 * MIB, nodes=(0,), owner="keeps the arena")
    buffer = runtime.allocate(2 * MIB, nodes=(0,), owner="before")
    address = buffer.address
    mbind(address, buffer.bytes, BIND, [wrong], 2)
    assert pages_by_node(address, buffer.bytes) == {wrong: 2 * MIB // PAGE}
    runtime.release(buffer)
    # the control: touched without more ado, the stretch follows what was left there
    touch(address, PAGE)
    assert pages_by_node(address, PAGE) == {wrong: 1}
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(2 * MIB), 4)  # MADV_DONTNEED
    again = runtime.allocate(2 * MIB, nodes=(0,), owner="after")
    assert again.address == address, "it is the same stretch"
    assert pages_by_node(address, again.bytes) == {right: 2 * MIB // PAGE}
    for held in (again, keeper):
        runtime.release(held)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_thousand_tensors_take_fewer_than_200_mappings(runtime):
    before = len(Path("/proc/self/maps").read_text().splitlines())
    nodes = len(runtime.layout.nodes)
    everywhere = tuple(range(nodes))
    for i in range(10_000):
        spread = i % 7 == 0 and nodes > 1
        runtime.allocate((1 + i % 3) * PAGE, nodes=everywhere if spread else (i % nodes,), interleaved=spread, owner=f"{i}")
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before < 200


def test_many_buffers_take_few_mappings(runtime):
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = mappings()
    everywhere = tuple(range(len(runtime.layout.nodes)))
    buffers = [
        runtime.allocate(
            PAGE,
            nodes=everywhere if i % 10 == 0 else (i % len(everywhere),),
            interleaved=i % 10 == 0 and len(everywhere) > 1,
            owner=f"layer {i}",
        )
        for i in range(300)
    ]
    assert mappings() - before < 20 * (len(everywhere) + 1)
    for buffer in buffers:
        runtime.release(buffer)


def test_a_report_names_every_arena(runtime):
    buffers = [runtime.allocate(MIB, nodes=(i,), owner="bound") for i in range(len(runtime.layout.nodes))]
    by_nodes = {tuple(arena.os_nodes): arena for arena in runtime.memory_report() if not arena.interleaved}
    for node in runtime.layout.nodes:
        arena = by_nodes[(node.os_node,)]
        assert (arena.obtained, arena.refused, arena.pages) == ("mbind", "", "4k")
        assert arena.used_bytes >= MIB
    for buffer in buffers:
        runtime.release(buffer)


def test_automatic_balancing_leaves_bound_memory_alone(lab, full_nodes):
    if not lab.numa_balancing:
        pytest.skip("this topology has automatic NUMA balancing off")
    first, last = full_nodes[0], full_nodes[-1]

    def read_from_afar(address: int, size: int, seconds: float) -> dict[int, int]:
        with pinned(lab.cpus_of(last)):
            until = time.monotonic() + seconds
            while time.monotonic() < until and pages_by_node(address, size) == {first: size // PAGE}:
                bytes_at(address, size)
        return pages_by_node(address, size)

    # the control: memory nobody bound is moved to its reader
    with anonymous(16 * MIB) as loose:
        with pinned(lab.cpus_of(first)):
            touch(loose, 16 * MIB)
        assert last in read_from_afar(loose, 16 * MIB, seconds=40)
    runtime = native.Runtime(layout_of())
    bound = runtime.allocate(16 * MIB, nodes=(0,), owner="bound")
    assert read_from_afar(bound.address, bound.bytes, seconds=8) == {first: bound.bytes // PAGE}


def bytes_at(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)

