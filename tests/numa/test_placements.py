"""Every placement of every kind of weight in every format: where the kernel says its pages are, what it computes, and what
it counts as remote."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from numagraft import native
from numagraft.errors import PlacementError
from numagraft.placement import Placement, PlacementSpec, Placer
from numagraft.platform import Platform
from numagraft.report import PlacedWeight, PlacementReport, build_report
from numagraft.runtime import RuntimeLayout, RuntimeSettings

from . import syscalls
from .syscalls import BIND, INTERLEAVE, MIB, PAGE, in_child, pages_by_node
from .weights import FORMATS, KINDS, Experts, Linear, difference, place

pytestmark = pytest.mark.numa

MOVE = 2  # MPOL_MF_MOVE
# Sums in fp32 in another order: some hundred terms, each off by at most half a unit in the last place.
ROUNDING = 1e-5


def layout_of(**settings) -> RuntimeLayout:
    return RuntimeLayout.from_platform(Platform.detect(), RuntimeSettings(**{"pages": "4k", **settings}))


@pytest.fixture(scope="module")
def runtime(full_nodes) -> native.Runtime:
    return native.Runtime(layout_of())


@cache
def one_node_output(runtime: native.Runtime, kind: type, format: str, tokens: int):
    weights, _ = place(runtime, kind, format, PlacementSpec("bind", nodes=(runtime.layout.nodes[0].os_node,)))
    return weights.forward(tokens)


def found_pages(weights) -> list[dict[int, int]]:
    return [pages_by_node(buffer.address, buffer.bytes) for buffer in weights.weights.buffers()]


def total(pages: list[dict[int, int]]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for counts in pages:
        for node, count in counts.items():
            sums[node] = sums.get(node, 0) + count
    return sums


def verify(runtime: native.Runtime, weights) -> None:
    buffers = weights.weights.buffers()
    assert {count.method for count in runtime.verify(buffers)} == {"move_pages"}


@contextmanager
def misplaced(address: int, size: int, *, right: int, wrong: int) -> Iterator[None]:
    """Moves pages to the wrong node, and back: the policy of a page outlives its owner in the arena."""
    assert right != wrong
    syscalls.mbind(address, size, BIND, [wrong], MOVE)
    assert pages_by_node(address, size) == {wrong: size // PAGE}
    try:
        yield
    finally:
        syscalls.mbind(address, size, BIND, [right], MOVE)


def report(runtime: native.Runtime, weights, placement: Placement) -> PlacementReport:
    return build_report(
        [PlacedWeight("rule", weights.module, placement, weights.weights.buffers())], runtime, page_cache_residue=0
    )


def read(weights, tokens: int) -> tuple[int, int]:
    """(bytes, remote bytes) of one call."""
    before = weights.weights.stats()
    weights.forward(tokens)
    after = weights.weights.stats()
    assert after.calls == before.calls + 1
    return after.bytes_read - before.bytes_read, after.remote_bytes - before.remote_bytes


def check_output(runtime: native.Runtime, kind: type, format: str, weights) -> None:
    for tokens in (1, 5):
        assert difference(weights.forward(tokens), one_node_output(runtime, kind, format, tokens)) <= ROUNDING


kinds_and_formats = pytest.mark.parametrize(
    ("kind", "format"), [pytest.param(kind, f, id=f"{name}-{f}") for name, kind in KINDS.items() for f in FORMATS]
)


@kinds_and_formats
def test_mirror_has_one_complete_replica_on_every_node(runtime, kind, format):
    weights, placement = place(runtime, kind, format, PlacementSpec("mirror"))
    nodes = [node.os_node for node in runtime.layout.nodes]
    pages = total(found_pages(weights))
    whole = -(-kind.units(format).packed_bytes // PAGE)
    assert sorted(pages) == nodes and len(set(pages.values())) == 1, pages
    assert whole <= pages[nodes[0]] <= whole + 1
    assert all(len(counts) == 1 for counts in found_pages(weights)), "no buffer lies on two nodes"
    verify(runtime, weights)
    for tokens in (1, 5):
        bytes, remote = read(weights, tokens)
        assert bytes > 0 and remote == 0
    check_output(runtime, kind, format, weights)
    assert report(runtime, weights, placement).require().rows[0].replicas == (len(nodes),) * 2


@kinds_and_formats
def test_shard_has_each_nodes_slice_on_it_once(runtime, kind, format):
    weights, placement = place(runtime, kind, format, PlacementSpec("shard"))
    nodes = [node.os_node for node in runtime.layout.nodes]
    asked = {runtime.layout.nodes[part.memory_nodes[0]].os_node for part in placement.parts}
    pages = found_pages(weights)
    assert len(pages) == len(placement.parts) and all(len(counts) == 1 for counts in pages)
    assert set(total(pages)) == asked == set(nodes)
    whole = -(-kind.units(format).packed_bytes // PAGE)
    assert whole <= sum(total(pages).values()) <= whole * 1.02 + 2 * len(nodes), "the total is one copy"
    verify(runtime, weights)
    for tokens in (1, 5):
        bytes, remote = read(weights, tokens)
        assert bytes > 0 and remote == 0
    check_output(runtime, kind, format, weights)
    assert report(runtime, weights, placement).require().ok


@kinds_and_formats
def test_interleave_spreads_evenly_and_counts_the_rest_as_remote(runtime, kind, format):
    weights, placement = place(runtime, kind, format, PlacementSpec("interleave"))
    nodes = {node.os_node for node in runtime.layout.nodes}
    for counts in found_pages(weights):
        assert set(counts) == nodes
        assert max(counts.values()) - min(counts.values()) <= max(1, 0.01 * sum(counts.values()))
    verify(runtime, weights)
    bytes, remote = read(weights, 1)
    if sum(total(found_pages(weights)).values()) >= 2 * len(nodes):
        assert remote / bytes == pytest.approx(1 - 1 / len(nodes), abs=0.1)
    else:  # one page for each node: where slices are about a page long, most of a node's slice may happen to be its page
        assert 0 < remote < bytes
    check_output(runtime, kind, format, weights)
    assert report(runtime, weights, placement).require().ok


@kinds_and_formats
def test_bind_lies_on_its_node_and_is_computed_there(runtime, kind, format):
    node = runtime.layout.nodes[-1].os_node
    weights, placement = place(runtime, kind, format, PlacementSpec("bind", nodes=(node,)))
    assert set(total(found_pages(weights))) == {node}
    verify(runtime, weights)
    assert read(weights, 5)[1] == 0
    last = runtime.layout.nodes[-1]  # the caller takes the first slot of the call's first node itself
    assert busy_nodes(runtime, weights) == ({len(runtime.layout.nodes) - 1} if last.threads > 1 else set())
    check_output(runtime, kind, format, weights)
    assert report(runtime, weights, placement).require().ok


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_threads_of_the_placements_nodes_compute_and_no_others(runtime, kind):
    nodes = runtime.layout.nodes
    last = len(nodes) - 1
    weights, _ = place(runtime, kind, "int8", PlacementSpec("bind", nodes=(nodes[last].os_node,)))
    # the caller takes the first slot of the call's first node itself
    assert busy_nodes(runtime, weights) == {i for i in (last,) if nodes[i].threads > 1}
    weights, _ = place(runtime, kind, "int8", PlacementSpec("mirror"))
    assert busy_nodes(runtime, weights) == {i for i in range(len(nodes)) if i or nodes[i].threads > 1}


def test_mirror_divides_prefill_by_tokens_and_decode_by_columns(runtime):
    """Of many tokens each node takes its share and reads all of its own copy; of one, each reads its share of the copy."""
    alone, _ = place(runtime, Linear, "int8", PlacementSpec("bind", nodes=(runtime.layout.nodes[0].os_node,)))
    mirrored, _ = place(runtime, Linear, "int8", PlacementSpec("mirror"))
    verify(runtime, mirrored)
    one, many = read(alone, 1)[0], read(alone, 256)[0]
    assert read(mirrored, 1) == (one, 0)
    assert read(mirrored, 256) == (many * len(runtime.layout.nodes), 0)
    assert difference(mirrored.forward(256), alone.forward(256)) <= ROUNDING


def busy_nodes(runtime: native.Runtime, weights) -> set[int]:
    """Runtime nodes whose pool threads ran during some calls, by the scheduler's account."""
    of_cpu = {cpu: i for i, node in enumerate(runtime.layout.nodes) for cpu in node.cpus}

    def ran() -> dict[int, int]:
        tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
        return {int(task.name): int((task / "schedstat").read_text().split()[0]) for task in tasks}

    weights.forward(64)
    time.sleep(0.1)  # until who took part in that has gone to sleep
    before, masks = ran(), syscalls.thread_cpus()
    for _ in range(3):
        weights.forward(64)
    return {of_cpu[min(masks[thread])] for thread, spent in ran().items() if spent > before[thread]}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("policy", ["mirror", "shard"])
def test_pages_on_the_wrong_node_show_in_report_and_counter(runtime, kind, policy):
    weights, placement = place(runtime, kind, "int8", PlacementSpec(policy))
    assert report(runtime, weights, placement).ok
    victim = weights.weights.buffers()[-1]
    right, wrong = runtime.layout.nodes[victim.nodes[0]].os_node, runtime.layout.nodes[0].os_node
    with misplaced(victim.address, victim.bytes, right=right, wrong=wrong):
        shown = report(runtime, weights, placement)
        assert not shown.ok and "WRONG" in shown.verdict
        with pytest.raises(PlacementError) as refusal:
            shown.require()
        message = f"{kind.module}: {victim.bytes // PAGE} pages .* node {right} are on node {wrong}"
        assert re.search(message, str(refusal.value))
        assert read(weights, 1)[1] > 0, "the report's answers are the counter's"
        check_output(runtime, kind, "int8", weights)
    assert report(runtime, weights, placement).ok
    assert read(weights, 1)[1] == 0


def test_one_page_on_the_wrong_node_is_found(runtime):
    weights, placement = place(runtime, Linear, "bf16", PlacementSpec("mirror"))
    victim = weights.weights.buffers()[0]
    right, wrong = runtime.layout.nodes[victim.nodes[0]].os_node, runtime.layout.nodes[-1].os_node
    with misplaced(victim.address + 8 * PAGE, PAGE, right=right, wrong=wrong):
        shown = report(runtime, weights, placement)
    assert not shown.ok
    assert [(item.found, item.pages) for item in shown.misplaced] == [(wrong, 1)]


def test_a_replica_per_socket(lab, runtime):
    if len({node.socket for node in runtime.layout.nodes}) == len(runtime.layout.nodes):
        pytest.skip("this topology has one node a socket")
    for kind in KINDS.values():
        weights, placement = place(runtime, kind, "int8", PlacementSpec("mirror", per="socket"))
        by_socket: dict[int | None, set[int]] = {}
        for node in runtime.layout.nodes:
            by_socket.setdefault(lab.socket_of(node.os_node), set()).add(node.os_node)
        assert placement.replicas == len(by_socket)
        for counts in found_pages(weights):
            assert set(counts) in by_socket.values(), "a replica stays within its socket"
            assert max(counts.values()) - min(counts.values()) <= max(1, 0.01 * sum(counts.values()))
        check_output(runtime, kind, "int8", weights)
        verify(runtime, weights)
        bytes, remote = read(weights, 1)
        share = 1 - 1 / len(next(iter(by_socket.values())))
        assert remote / bytes == pytest.approx(share, abs=0.1)
        assert report(runtime, weights, placement).require().ok


def test_a_budget_mirrors_what_fits_and_shards_the_rest(runtime):
    units = Linear.units("int8")
    placer = Placer(runtime.layout)
    spec = PlacementSpec("mirror", budget=int(2.5 * units.packed_bytes))
    placements = [placer.place("rule", spec, units) for _ in range(4)]
    assert [placement.policy for placement in placements] == ["mirror", "mirror", "shard", "shard"]
    assert "budget" in placements[2].reason
    built = [Linear(runtime, "int8", placement.parts) for placement in placements]
    copies = [sum(total(found_pages(weights)).values()) for weights in built]
    assert copies[0] == copies[1] > 1.5 * copies[2]
    whole = build_report(
        [
            PlacedWeight("rule", f"layers.{i}", p, w.weights.buffers())
            for i, (p, w) in enumerate(zip(placements, built, strict=True))
        ],
        runtime,
    )
    assert whole.require().rows[0].policies == ("mirror", "shard")


def test_auto_says_why(runtime):
    units = Experts.units("int8")
    _, placement = place(runtime, Experts, "int8", PlacementSpec("auto"))
    assert placement.policy == "bind" and "less than" in placement.reason
    weights, placement = place(runtime, Experts, "int8", PlacementSpec("auto"), small_bytes=units.packed_bytes // 2)
    assert placement.policy == "shard" and placement.reason.startswith("auto: ")
    weights, placement = place(
        runtime, Experts, "int8", PlacementSpec("auto"), small_bytes=0, mirror_gains=("prefill divided by tokens",)
    )
    assert placement.policy == "mirror" and "prefill divided by tokens" in placement.reason
    assert set(total(found_pages(weights))) == {node.os_node for node in runtime.layout.nodes}
    # where the copies do not fit, it shards and says so
    tight = dict.fromkeys(range(len(runtime.layout.nodes)), units.packed_bytes)
    _, placement = place(
        runtime, Experts, "int8", PlacementSpec("auto"), small_bytes=0, mirror_gains=("x",), free_bytes_by_node=tight
    )
    assert placement.policy == "shard" and "do not fit" in placement.reason


@pytest.mark.parametrize("mode", [INTERLEAVE, BIND])
def test_an_inherited_policy_does_not_change_where_weights_go(full_nodes, mode):
    chosen = full_nodes if mode == INTERLEAVE else full_nodes[-1:]

    def placed() -> list[str]:
        syscalls.set_mempolicy(mode, chosen)
        runtime = native.Runtime(layout_of())
        verdicts = []
        for kind in KINDS.values():
            for spec in (PlacementSpec("mirror"), PlacementSpec("shard"), PlacementSpec("bind", nodes=full_nodes[:1])):
                weights, placement = place(runtime, kind, "int8", spec)
                for buffer in weights.weights.buffers():
                    nodes = {runtime.layout.nodes[i].os_node for i in buffer.nodes}
                    assert set(pages_by_node(buffer.address, buffer.bytes)) == nodes
                weights.forward(3)
                verdicts.append(report(runtime, weights, placement).require().verdict)
        return verdicts

    assert all(verdict.startswith("as asked") for verdict in in_child(placed))


@pytest.mark.parametrize(("pages", "size"), [("2m", 2 * MIB), ("1g", 1024 * MIB)])
def test_the_report_says_which_pages_were_got(lab, runtime, pages, size):
    if not {"2m": lab.huge_2m, "1g": lab.huge_1g}[pages]:
        pytest.skip("this topology has no such pages reserved")
    expected = {kind: one_node_output(runtime, kind, "int8", 5) for kind in KINDS.values()}

    def placed() -> list[tuple[dict, list[dict], list[dict], float]]:
        huge = native.Runtime(layout_of(pages=pages))
        found = []
        for kind in KINDS.values():
            weights, placement = place(huge, kind, "int8", PlacementSpec("mirror"))
            rows = report(huge, weights, placement).require().rows
            addresses = [buffer.address for buffer in weights.weights.buffers()]
            sizes = [syscalls.page_sizes(address, PAGE) for address in addresses]
            off = difference(weights.forward(5), expected[kind])
            found.append((total(found_pages(weights)), [row.page_bytes for row in rows], sizes, off))
        return found

    for per_node, reported, sizes, off in in_child(placed):
        assert set(per_node) == {node.os_node for node in runtime.layout.nodes}
        for pages_of_row in reported:
            assert set(pages_of_row) == {size}
        assert all(set(of_mapping) == {size} for of_mapping in sizes)
        assert off <= ROUNDING


def test_weights_on_a_memory_only_node_are_computed_nearby(lab, full_nodes):
    memory_only = [node for node in lab.with_memory if node not in lab.with_cpus]
    if not memory_only:
        pytest.skip("this topology has no memory-only node")
    runtime = native.Runtime(layout_of(nodes=lab.with_memory))
    for kind in KINDS.values():
        weights, placement = place(runtime, kind, "int4", PlacementSpec("bind", nodes=tuple(memory_only)))
        assert set(total(found_pages(weights))) == set(memory_only)
        verify(runtime, weights)
        bytes, remote = read(weights, 1)
        assert remote == bytes > 0, "all of it comes from another node, and is counted so"
        assert report(runtime, weights, placement).require().ok
        everywhere = PlacementSpec("interleave", nodes=lab.with_memory)
        weights, placement = place(runtime, kind, "int4", everywhere)
        assert set(total(found_pages(weights))) == set(lab.with_memory)
        assert difference(weights.forward(5), one_node_output(runtime, kind, "int4", 5)) <= ROUNDING


def test_a_mirror_that_does_not_fit_is_refused_and_nothing_stays(lab, full_nodes):
    """Weights that would fill the last node: an error that names it, and the memory of the others is back."""
    last = full_nodes[-1]

    def attempt() -> tuple[str, int]:
        runtime = native.Runtime(layout_of())
        runtime.observe_workers()
        before = syscalls.node_free(full_nodes[0])
        with syscalls.filled(last, leave=24 * MIB), pytest.raises(PlacementError) as refusal:
            place(runtime, Linear, "bf16", PlacementSpec("mirror"))
        return str(refusal.value), before - syscalls.node_free(full_nodes[0])

    message, leaked = in_child(attempt)
    assert Linear.module in message and f"node {last}" in message
    assert leaked < 32 * MIB


def test_under_a_container_filter_the_report_lists_how_it_was_obtained(full_nodes):
    def placed() -> tuple[bool, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        layout = layout_of()
        syscalls.refuse("mbind", "set_mempolicy", "get_mempolicy", "migrate_pages", errno=errno.EPERM)
        runtime = native.Runtime(layout)
        weights, placement = place(runtime, Linear, "int8", PlacementSpec("mirror"))
        shown = report(runtime, weights, placement).require()
        return shown.ok, shown.rows[0].obtained, shown.fallbacks, shown.methods

    ok, obtained, fallbacks, methods = in_child(placed)
    assert ok and obtained == ("first_touch",) and methods == ("move_pages",)
    assert any("EPERM" in text for text in fallbacks)


def test_where_nothing_can_be_asked_the_report_does_not_vouch(full_nodes):
    """move_pages is refused and numa_maps tells of whole mappings only: what cannot be proven is not said to be right."""
    def placed() -> tuple[bool, str]:
        layout = layout_of()
        syscalls.refuse("mbind", "set_mempolicy", "get_mempolicy", "migrate_pages", "move_pages", errno=errno.EPERM)
        runtime = native.Runtime(layout)
        weights, placement = place(runtime, Linear, "int8", PlacementSpec("mirror"))
        shown = report(runtime, weights, placement)
        return shown.ok, shown.verdict

    ok, verdict = in_child(placed)
    assert "numa_maps" in verdict if ok else "NOT VERIFIED" in verdict
