"""Calls, barriers, exceptions and pinning, on this machine's CPUs and on virtual nodes."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from numagraft import native
from numagraft._native import sanitizer
from numagraft.errors import ConfigurationError, PlacementError
from numagraft.native import Runtime, inherited_policy
from numagraft.native import runtime as facade
from numagraft.native.limits import fork_join_seconds
from numagraft.runtime import RuntimeLayout, RuntimeNode

CPUS = sorted(os.sched_getaffinity(0))
THIS_NODE = 0


def bound(*threads_of_nodes: int) -> RuntimeLayout:
    """Nodes on this machine's CPUs, one thread per CPU, in order; skips where there are too few."""
    if sum(threads_of_nodes) > len(CPUS):
        pytest.skip(f"needs {sum(threads_of_nodes)} CPUs, this process may use {len(CPUS)}")
    if not os.path.exists(f"/sys/devices/system/node/node{THIS_NODE}"):
        pytest.skip("the kernel shows no node 0")
    left = list(CPUS)
    nodes = []
    for threads in threads_of_nodes:
        nodes.append(RuntimeNode(THIS_NODE, tuple(left[:threads]), threads))
        left = left[threads:]
    return RuntimeLayout(tuple(nodes))


@pytest.fixture(params=["virtual 1x1", "virtual 1x3", "virtual 4x2", "bound 1x2", "bound 2x1"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    kind, shape = request.param.split()
    nodes, threads = map(int, shape.split("x"))
    if kind == "virtual":
        return Runtime(RuntimeLayout.virtual(nodes, threads_per_node=threads))
    return Runtime(bound(*[threads] * nodes))


def test_every_worker_runs_once_with_its_ranks(runtime: Runtime) -> None:
    expected = []
    for node, spec in enumerate(runtime.layout.nodes):
        expected += [(node, rank, len(expected) + rank) for rank in range(spec.threads)]
    for _ in range(20):
        assert [(w.node, w.rank_in_node, w.rank) for w in runtime.observe_workers()] == expected


def test_workers_run_on_their_cpus() -> None:
    runtime = Runtime(bound(1, 1))
    for _ in range(20):
        assert [w.cpu for w in runtime.observe_workers()] == CPUS[:2]
        assert [w.cpu for w in runtime.observe_workers([1])] == CPUS[1:2]
        assert [w.cpu for w in runtime.observe_workers([1, 0])] == [CPUS[1], CPUS[0]]


def test_barriers_let_nobody_through_early(runtime: Runtime) -> None:
    nodes = list(range(len(runtime.layout.nodes)))
    assert runtime.native.barriers_hold(nodes, 200)


def test_without_barriers_somebody_is_early() -> None:
    if sanitizer() == "thread":
        pytest.skip("a race by intent")
    runtime = Runtime(RuntimeLayout.virtual(2))
    assert not all(runtime.native.barriers_hold([0, 1], 5000, leave_out=True) for _ in range(20))


def test_caller_mask_is_what_it_was() -> None:
    runtime = Runtime(bound(1, 1))
    for mask in ({CPUS[0]}, {CPUS[1]}, set(CPUS)):
        os.sched_setaffinity(0, mask)
        runtime.observe_workers()
        assert os.sched_getaffinity(0) == mask
        with pytest.raises(RuntimeError, match="planted"):
            runtime.native.fail_in_worker([0, 1], 0, "planted")
        assert os.sched_getaffinity(0) == mask
    assert inherited_policy().mode == "default"


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: a caller cannot be elsewhere")
def test_a_watched_caller_is_pinned_only_where_it_is_elsewhere() -> None:
    runtime = Runtime(bound(1, 1))
    fork_join_seconds(runtime, barriers=2, repetitions=1)  # makes the threads
    native.set_fault("sched_setaffinity", errno.EPERM)
    try:
        os.sched_setaffinity(0, {CPUS[0]})
        fork_join_seconds(runtime, barriers=2, repetitions=50)
        os.sched_setaffinity(0, {CPUS[1]})
        with pytest.raises(PlacementError, match=f"cannot pin a thread to CPU {CPUS[0]}: sched_setaffinity says EPERM"):
            fork_join_seconds(runtime, barriers=2, repetitions=1)
        native.set_fault("sched_setaffinity", None)
        fork_join_seconds(runtime, barriers=2, repetitions=50)
        assert os.sched_getaffinity(0) == {CPUS[1]}
    finally:
        native.set_fault("sched_setaffinity", None)
        os.sched_setaffinity(0, CPUS)


@pytest.mark.parametrize("rank", [0, 1])
def test_exception_of_a_worker_reaches_the_caller_and_frees_the_others(rank: int) -> None:
    runtime = Runtime(RuntimeLayout.virtual(2, threads_per_node=2))
    for attempt in range(50):
        with pytest.raises(RuntimeError, match=f"attempt {attempt}$"):
            runtime.native.fail_in_worker([0, 1], rank, f"attempt {attempt}")
    assert runtime.native.barriers_hold([0, 1], 20)


def test_threads_of_python_call_at_once() -> None:
    runtime = Runtime(RuntimeLayout.virtual(3))
    wrong: list[object] = []

    def call(nodes: list[int]) -> None:
        for _ in range(200):
            places = [w.node for w in runtime.observe_workers(nodes)]
            if places != nodes or not runtime.native.barriers_hold(nodes, 2):
                wrong.append(places)

    callers = [threading.Thread(target=call, args=(nodes,)) for nodes in ([0, 1], [1, 2], [2, 0], [0], [2, 1, 0])]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize(("nodes", "together"), [(([0], [1]), True), (([0], [0]), False), (([0, 1], [1]), False)])
def test_calls_on_disjoint_nodes_overlap_and_others_queue(nodes: tuple[list[int], list[int]], together: bool) -> None:
    runtime = Runtime(RuntimeLayout.virtual(2))
    spans: list[tuple[float, float]] = []
    callers = [threading.Thread(target=lambda on=on: spans.append(runtime.native.keep_busy(on, 0.3))) for on in nodes]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    first, second = sorted(spans)
    assert (second[0] < first[1]) == together


@pytest.mark.parametrize(
    ("nodes", "message"), [([2], "not one of the runtime's 2"), ([-1], "not one"), ([0, 0], "twice"), ([], "none")]
)
def test_nodes_that_a_call_cannot_have(nodes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runtime(RuntimeLayout.virtual(2)).observe_workers(nodes)


def test_pools_are_shared_by_equal_layouts_and_refused_to_others() -> None:
    first = Runtime(bound(1, 1))
    second = Runtime(bound(1, 1))
    assert [w.cpu for w in first.observe_workers()] == [w.cpu for w in second.observe_workers()]
    with pytest.raises(ConfigurationError, match=r"a live runtime already runs 1 threads.*\n    give both"):
        Runtime(bound(2))
    del first, second
    assert len(Runtime(bound(2)).observe_workers()) == 2


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (RuntimeLayout(()), "it has no node"),
        (RuntimeLayout((RuntimeNode(0, (), 0),)), "no node has a thread"),
        (RuntimeLayout((RuntimeNode(None, (0,), 1),)), "has no kernel node"),
        (RuntimeLayout((RuntimeNode(0, (), 1),)), "has threads but no CPUs"),
        (RuntimeLayout((RuntimeNode(0, (0,), 1), RuntimeNode(0, (0,), 1))), "CPU 0, which is named before"),
        (RuntimeLayout((RuntimeNode(0, (9000,), 1),)), "names CPU 9000"),
        (RuntimeLayout((RuntimeNode(0, (0,), -1),)), "has -1 threads"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(layout: RuntimeLayout, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Runtime(layout)


def test_scratch_is_kept_and_grows() -> None:
    runtime = Runtime(RuntimeLayout.virtual(2, threads_per_node=2))
    small = runtime.native.scratch_of_workers([0, 1], 1000)
    assert len(set(small.values())) == 4
    assert runtime.native.scratch_of_workers([0, 1], 1000) == small
    large = runtime.native.scratch_of_workers([0, 1], 1 << 20)
    assert all(address % 64 == 0 for address in large.values())
    assert runtime.native.scratch_of_workers([0, 1], 5000) == large


def test_shared_scratch_is_leased_to_one() -> None:
    runtime = Runtime(RuntimeLayout.virtual(1))
    first = runtime.native.shared_scratch(1000, 0)
    second = runtime.native.shared_scratch(1000, 0)
    assert first.address != second.address
    address = first.address
    del first
    assert runtime.native.shared_scratch(500, 0).address == address
    third = runtime.native.shared_scratch(10_000_000, 0)
    assert third.bytes >= 10_000_000


def test_facade_exports_its_placed_buffers() -> None:
    runtime = Runtime(RuntimeLayout.virtual(2))
    buffer = runtime.allocate(5000, [0, 1], interleaved=True, owner="model.layers.0")
    placed = facade.PlacedBuffer.of(buffer)
    assert (placed.bytes, placed.nodes, placed.interleaved, placed.owner) == (8192, (0, 1), True, "model.layers.0")
