"""The report against this machine's kernel: pages that are really there, and pages that really are not."""

from __future__ import annotations

import ctypes
import errno

import pytest

from numagraft import native
from numagraft.errors import PlacementError
from numagraft.placement import PlacementSpec, resolve
from numagraft.platform import Platform
from numagraft.report import PlacedWeight, build_report
from numagraft.runtime import RuntimeLayout

PAGE = 4096
MIB = 1 << 20
MADV_DONTNEED = 4


class Units:
    count, multiple, packed_bytes = 64, 16, MIB


@pytest.fixture
def runtime():
    return native.Runtime(RuntimeLayout.from_platform(Platform.detect()))


@pytest.fixture(autouse=True)
def no_faults():
    yield
    for call in native.system.CALLS:
        native.set_fault(call, None)


def place(runtime, *, policy="bind", count=3):
    """`count` weights of 1 MiB, all on the first node."""
    layout = runtime.layout
    node = layout.nodes[0].os_node
    placement = resolve(PlacementSpec(policy, nodes=(node,) if node is not None else (0,)), Units, layout)
    return [
        PlacedWeight(
            "rule", f"layers.{i}", placement, [native.PlacedBuffer.of(runtime.allocate(MIB, [0], owner=f"layers.{i}"))]
        )
        for i in range(count)
    ]


def drop(address, size):
    assert (
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_DONTNEED) == 0
    )


def test_what_was_allocated_is_found(runtime):
    report = build_report(place(runtime), runtime, page_cache_residue=0)
    assert report.ok, str(report)
    (row,) = report.rows
    assert (row.asked_bytes, row.found_bytes, row.modules) == (3 * MIB, 3 * MIB, 3)
    assert sum(row.page_bytes.values()) == pytest.approx(3 * MIB, abs=2)
    assert row.cpus == runtime.layout.nodes[0].cpus[: runtime.layout.nodes[0].threads]
    assert row.verdict == "as asked"
    assert report.methods == ("move_pages",)
    assert report.arenas >= 1


def test_one_page_that_is_gone_is_named(runtime):
    weights = place(runtime)
    drop(weights[1].buffers[0].address + 5 * PAGE, PAGE)
    report = build_report(weights, runtime)
    with pytest.raises(PlacementError) as caught:
        report.require()
    (problem,) = caught.value.problems
    assert problem.where == "layers.1"
    assert "1 pages (4.00 KiB) asked for node" in problem.message and "are not in memory" in problem.message


def test_it_asks_anew_every_time(runtime):
    weights = place(runtime)
    assert build_report(weights, runtime).ok
    drop(weights[0].buffers[0].address, MIB)
    assert not build_report(weights, runtime).ok


def test_refused_binding_is_reported_and_proven_all_the_same(runtime):
    native.set_fault("mbind", errno.EPERM)
    weights = place(native_runtime := native.Runtime(runtime.layout))
    report = build_report(weights, native_runtime)
    assert report.ok, str(report)
    assert report.fallbacks and "EPERM" in report.fallbacks[0]
    assert "mbind" not in report.rows[0].obtained


def test_a_refused_query_is_answered_by_numa_maps_or_not_proven(runtime):
    weights = place(runtime)
    native.set_fault("move_pages", errno.EPERM)
    report = build_report(weights, runtime)
    assert report.methods in (("numa_maps",), ("unverifiable",))
    if len(Platform.detect().nodes) == 1 and report.methods == ("numa_maps",):
        assert report.ok, str(report)


def test_a_virtual_runtime_never_claims_a_proof():
    runtime = native.Runtime(RuntimeLayout.virtual(2))
    placement = resolve(PlacementSpec("mirror"), Units, runtime.layout)
    buffers = [native.PlacedBuffer.of(runtime.allocate(MIB, [i], owner="m")) for i in range(2)]
    report = build_report([PlacedWeight("rule", "m", placement, buffers)], runtime)
    assert report.verdict == "virtual: not bound"
    assert [row.found_bytes for row in report.rows] == [None, None]
    one = build_report([PlacedWeight("rule", "m", placement, buffers[:1])], runtime)
    assert not one.ok  # but a missing replica is seen even there
