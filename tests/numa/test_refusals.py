"""When the system refuses: another way that is verified, or an error that names cause and remedy. Never a kill."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from numagraft import native
from numagraft.errors import PlacementError
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout, RuntimeNode, RuntimeSettings

from . import syscalls
from .control_groups import control_group, join
from .syscalls import BIND, INTERLEAVE, MIB, PAGE, anonymous, in_child, mbind, pages_by_node, touch

pytestmark = pytest.mark.numa

CONTAINER = ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "migrate_pages")  # what Docker's filter denies


def layout_of(*, pages: str = "4k", nodes: tuple[int, ...] | str = "all") -> RuntimeLayout:
    return RuntimeLayout.from_platform(Platform.detect(), RuntimeSettings(pages=pages, nodes=nodes))


def numa_maps_nodes(address: int) -> dict[int, int]:
    """Node -> pages of the mapping that holds an address, from numa_maps: for where move_pages is refused."""
    best = ""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if int(line.split()[0], 16) <= address:
            best = line
    return {int(node): int(pages) for node, pages in re.findall(r" N(\d+)=(\d+)", best)}


@pytest.mark.parametrize(
    ("refused", "obtained"), [(("mbind",), "set_mempolicy"), (("mbind", "set_mempolicy"), "first_touch"), (CONTAINER, "first_touch")]
)
def test_under_a_container_filter_memory_gets_there_another_way(usable_nodes, refused, obtained):
    def placed() -> list:
        layout = layout_of()
        syscalls.refuse(*refused, errno=errno.EPERM)
        runtime = native.Runtime(layout)
        found = []
        for index, node in enumerate(layout.nodes):
            buffer = runtime.allocate(2 * MIB, nodes=(index,), owner="bound")
            arenas = {tuple(a.os_nodes): (a.obtained, a.refused) for a in runtime.memory_report()}
            query = native.query_pages(buffer.address, buffer.bytes)
            kernel = (
                numa_maps_nodes(buffer.address)
                if "move_pages" in refused
                else pages_by_node(buffer.address, buffer.bytes)
            )
            found.append((node.os_node, kernel, arenas[(node.os_node,)], query.per_node, query.method))
        return found

    for node, kernel, arena, query, method in in_child(placed):
        assert kernel == {node: 2 * MIB // PAGE}
        assert arena == (obtained, "EPERM")
        assert query == {node: 2 * MIB // PAGE}
        assert method == ("numa_maps" if "move_pages" in refused else "move_pages")


@pytest.mark.parametrize("refused", [("mbind",), ("mbind", "set_mempolicy")])
def test_interleaving_under_a_filter_is_even(full_nodes, refused):
    def placed() -> tuple[set, dict[int, int]]:
        layout = layout_of()
        syscalls.refuse(*refused, errno=errno.EPERM)
        runtime = native.Runtime(layout)
        nodes = tuple(range(len(layout.nodes)))
        buffer = runtime.allocate(1200 * PAGE, nodes=nodes, interleaved=True, owner="spread")
        return {node.os_node for node in layout.nodes}, pages_by_node(buffer.address, buffer.bytes)

    nodes, found = in_child(placed)
    assert set(found) == nodes
    assert max(found.values()) - min(found.values()) <= max(2, 0.01 * 1200)


def test_an_inherited_policy_under_a_filter_is_never_taken_for_success(full_nodes):
    """Interleaving is inherited and nothing can undo it: pinned first touch does not help. That must not pass unseen."""

    def attempt() -> tuple[str, dict[int, int], dict[int, int]]:
        syscalls.set_mempolicy(INTERLEAVE, full_nodes)
        layout = layout_of()
        syscalls.refuse("mbind", "set_mempolicy", errno=errno.EPERM)
        try:
            runtime = native.Runtime(layout)
            buffer = runtime.allocate(2 * MIB, nodes=(0,), owner="bound")
        except PlacementError as error:
            return str(error), {}, {}
        return "", native.query_pages(buffer.address, buffer.bytes).per_node, pages_by_node(buffer.address, buffer.bytes)

    error, query, kernel = in_child(attempt)
    if error:
        assert "policy" in error
    else:
        assert len(kernel) > 1, "the control: the pages really are elsewhere"
        assert query == kernel


def test_a_memory_only_node_cannot_be_had_by_first_touch(lab):
    memory_only = [node for node in lab.with_memory if node not in lab.with_cpus]
    if not memory_only:
        pytest.skip("this topology has no memory-only node")

    def attempt() -> None:
        layout = layout_of(nodes=lab.with_memory)
        index = next(i for i, node in enumerate(layout.nodes) if node.os_node == memory_only[0])
        syscalls.refuse(*CONTAINER, errno=errno.EPERM)
        native.Runtime(layout).allocate(MIB, nodes=(index,), owner="far.weights")

    with pytest.raises(PlacementError, match=r"(?s)far\.weights.*node without threads.*SYS_NICE"):
        in_child(attempt)


def test_a_refused_pin_is_an_error_not_an_unpinned_worker(usable_nodes):
    def attempt() -> None:
        runtime = native.Runtime(layout_of())
        native.set_fault("sched_setaffinity", errno.EPERM)
        runtime.observe_workers(tuple(range(len(runtime.layout.nodes))))

    with pytest.raises(PlacementError, match="EPERM"):
        in_child(attempt)


def test_a_full_node_is_refused_before_the_kernel_kills(lab, usable_nodes):
    node = usable_nodes[-1]

    def attempt() -> str:
        layout = layout_of()
        runtime = native.Runtime(layout)
        last = len(layout.nodes) - 1
        with syscalls.filled(node, leave=100 * MIB):
            with pytest.raises(PlacementError) as refusal:
                runtime.allocate(160 * MIB, nodes=(last,), owner="layers.9.experts")
            # what does fit is still served
            buffer = runtime.allocate(4 * MIB, nodes=(last,), owner="small")
            assert pages_by_node(buffer.address, buffer.bytes) == {node: 4 * MIB // PAGE}
        # and with room again, so is the large one
        runtime.allocate(160 * MIB, nodes=(last,), owner="layers.9.experts")
        return str(refusal.value)

    message = in_child(attempt)
    assert re.search(rf"layers\.9\.experts needs 160(\.0)? MiB on node {node}, which has \d+(\.\d+)? MiB left", message)
    assert "shard" in message


def test_a_copy_on_several_nodes_may_take_the_room_of_all_and_no_more(lab, full_nodes):
    """The first node is nearly full: the rest goes to the next, and more than both have is refused."""
    first, last = full_nodes[0], full_nodes[-1]

    def attempt() -> tuple[dict[int, int], str]:
        layout = layout_of()
        runtime = native.Runtime(layout)
        both = (0, len(layout.nodes) - 1)
        with syscalls.filled(first, leave=64 * MIB):
            room = sum(sum(syscalls.node_room(node)) for node in (first, last))
            with pytest.raises(PlacementError) as refusal:
                runtime.allocate(room + 64 * MIB, nodes=both, owner="too large")
            buffer = runtime.allocate(160 * MIB, nodes=both, owner="layers.0")
            return pages_by_node(buffer.address, buffer.bytes), str(refusal.value)

    found, message = in_child(attempt)
    assert set(found) <= {first, last} and found[last] > 60 * MIB // PAGE
    assert f"nodes {first},{last}" in message


def test_the_control_that_a_full_node_does_kill(lab, full_nodes):
    """Without the check, the process would be gone: this is why it is made."""
    if lab.name != "2-nodes":
        pytest.skip("shown on two nodes")
    node = full_nodes[-1]

    def overfill() -> None:
        size = 320 * MIB  # what a node keeps for the kernel is not always kept from this
        with anonymous(size) as address:
            mbind(address, size, BIND, [node])
            touch(address, size)

    with syscalls.filled(node, leave=100 * MIB), pytest.raises(syscalls.ChildKilled, match="SIGKILL"):
        in_child(overfill)


def test_a_memory_cgroup_is_respected_before_it_kills(lab):
    def attempt() -> str:
        join(group)
        runtime = native.Runtime(layout_of())
        with pytest.raises(PlacementError) as refusal:
            runtime.allocate(200 * MIB, nodes=(0,), owner="layers.3.mlp")
        runtime.allocate(8 * MIB, nodes=(0,), owner="small")
        return str(refusal.value)

    with control_group("tight", memory_max=str(150 * MIB)) as group:
        message = in_child(attempt)
    assert "layers.3.mlp needs 200" in message
    assert "memory.max" in message and "150" in message


def test_a_node_taken_away_after_planning_is_named(lab, full_nodes):
    """The layout was made when the node was there; by the time of loading a cpuset excludes it."""
    kept, lost = full_nodes[0], full_nodes[-1]

    def attempt() -> str:
        layout = layout_of()
        join(group)
        runtime = native.Runtime(layout)
        index = len(layout.nodes) - 1
        with pytest.raises(PlacementError) as refusal:
            runtime.allocate(MIB, nodes=(index,), owner="bound")
        with pytest.raises(PlacementError):
            runtime.allocate(MIB, nodes=(0, index), interleaved=True, owner="spread")
        buffer = runtime.allocate(MIB, nodes=(0,), owner="kept")
        assert pages_by_node(buffer.address, buffer.bytes) == {kept: MIB // PAGE}
        return str(refusal.value)

    with control_group("narrow", cpuset_mems=str(kept)) as group:
        message = in_child(attempt)
    assert re.search(rf"node {lost}\b", message) and "cpuset" in message


def test_a_node_that_does_not_exist_is_named(usable_nodes, online):
    absent = max(online) + 3
    layout = layout_of()
    ghost = RuntimeNode(absent, (), 0, total_bytes=1 << 30, free_bytes=1 << 30)

    def attempt() -> None:
        runtime = native.Runtime(replace(layout, nodes=(*layout.nodes, ghost)))
        runtime.allocate(MIB, nodes=(len(layout.nodes),), owner="ghost")

    with pytest.raises(PlacementError, match=rf"node {absent}\b"):
        in_child(attempt)


@pytest.mark.parametrize(("call", "number"), [("mmap", errno.ENOMEM), ("madvise", errno.ENOMEM), ("mbind", errno.ENOMEM)])
def test_a_failure_half_way_leaves_nothing_behind(usable_nodes, call, number):
    def attempt() -> tuple[str, int]:
        runtime = native.Runtime(layout_of())
        node = runtime.layout.nodes[0].os_node
        runtime.observe_workers((0,))
        before = syscalls.node_free(node)
        native.set_fault(call, number)
        with pytest.raises(PlacementError) as refusal:
            runtime.allocate(64 * MIB, nodes=(0,), owner="layers.0")
        native.set_fault(call, None)
        leaked = before - syscalls.node_free(node)
        buffer = runtime.allocate(MIB, nodes=(0,), owner="after")
        assert pages_by_node(buffer.address, buffer.bytes) == {node: MIB // PAGE}
        return str(refusal.value), leaked

    message, leaked = in_child(attempt)
    assert "ENOMEM" in message
    assert leaked < 8 * MIB


def test_locked_memory_beyond_its_limit_is_an_error(usable_nodes):
    def attempt() -> str:
        layout = layout_of()
        runtime = native.Runtime(layout)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * MIB, 8 * MIB))
        os.setuid(65534)  # root may lock without limit
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(2):  # MCL_FUTURE
            raise OSError(ctypes.get_errno(), "mlockall")
        with pytest.raises(PlacementError) as refusal:
            runtime.allocate(64 * MIB, nodes=(0,), owner="bound")
        return str(refusal.value)

    assert "ulimit -l" in in_child(attempt)


def test_huge_pages_are_taken_from_their_node_or_refused_with_the_line_to_run(lab, full_nodes):
    if not lab.huge_2m:
        pytest.skip("this topology has no huge pages reserved")
    files = {node: syscalls.NODES / f"node{node}/hugepages/hugepages-2048kB" for node in full_nodes}

    def free(node: int) -> int:
        return int((files[node] / "free_hugepages").read_text())

    def attempt() -> str:
        layout = layout_of(pages="2m")
        runtime = native.Runtime(layout)
        for index, node in enumerate(full_nodes):
            before = free(node)
            buffer = runtime.allocate(8 * MIB, nodes=(index,), owner="huge")
            assert pages_by_node(buffer.address, buffer.bytes) == {node: 8 * MIB // PAGE}
            assert syscalls.page_sizes(buffer.address, buffer.bytes) == {2 * MIB: 8 * MIB}
            assert native.query_page_sizes(buffer.address, buffer.bytes) == {2 * MIB: 8 * MIB}
            assert before - free(node) == 4
        with pytest.raises(PlacementError) as refusal:
            runtime.allocate(2 * (lab.huge_2m + 5) * MIB, nodes=(1,), owner="layers.1")
        return str(refusal.value)

    message = in_child(attempt)
    node = full_nodes[1]
    line = re.search(r"echo (\d+) > (\S+)", message)
    assert line and Path(line.group(2)) == files[node] / "nr_hugepages"
    # the remedy is right: with what it says, the same request is met
    reserved = (files[node] / "nr_hugepages").read_text()
    Path(line.group(2)).write_text(line.group(1))

    def again() -> dict[int, int]:
        runtime = native.Runtime(layout_of(pages="2m"))
        runtime.allocate(8 * MIB, nodes=(1,), owner="huge")
        buffer = runtime.allocate(2 * (lab.huge_2m + 5) * MIB, nodes=(1,), owner="layers.1")
        return pages_by_node(buffer.address, buffer.bytes)

    try:
        assert set(in_child(again)) == {node}
    finally:
        with contextlib.suppress(OSError):
            (files[node] / "nr_hugepages").write_text(reserved)


def test_pages_of_one_gibibyte_are_got_where_they_are_reserved(lab, full_nodes):
    if not lab.huge_1g:
        pytest.skip("this topology has no pages of 1 GiB reserved")

    def attempt() -> tuple[list, str, list]:
        runtime = native.Runtime(layout_of(pages="1g"))
        found = []
        for index, node in enumerate(full_nodes):
            pieces = [runtime.allocate(size, nodes=(index,), owner="giant") for size in (20 * MIB, 4 * MIB + PAGE)]
            for buffer in pieces:
                assert pages_by_node(buffer.address, buffer.bytes) == {node: buffer.bytes // PAGE}
                (count,) = runtime.verify([native.PlacedBuffer.of(buffer)])
                assert (count.per_node, count.absent) == ({node: buffer.bytes // PAGE}, 0)
            found.append(syscalls.page_sizes(pieces[0].address, pieces[0].bytes))
        with pytest.raises(PlacementError) as refusal:
            runtime.allocate(1100 * MIB, nodes=(1,), owner="layers.1")
        return found, str(refusal.value), [arena.page_bytes for arena in runtime.memory_report()]

    found, message, reported = in_child(attempt)
    assert found == reported == [{1 << 30: 1 << 30}] * len(full_nodes)
    pool = syscalls.NODES / f"node{full_nodes[1]}/hugepages/hugepages-1048576kB/nr_hugepages"
    assert f"echo 3 > {pool}" in message and "needs 2 huge pages of 1.0 GiB" in message


def test_one_gibibyte_pages_that_nobody_reserved_are_refused(lab, usable_nodes):
    if lab.huge_1g:
        pytest.skip("this topology has them reserved")

    def attempt() -> None:
        native.Runtime(layout_of(pages="1g")).allocate(MIB, nodes=(0,), owner="giant")

    with pytest.raises(PlacementError, match=r"1 GiB|1048576kB|hugepagesz=1G"):
        in_child(attempt)
