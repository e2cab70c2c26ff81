"""Every worker runs on its own node, by the kernel's word; the caller is left as it was."""

from __future__ import annotations

import os
import threading
import time

import pytest

from numagraft import native
from numagraft.errors import ConfigurationError
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout, RuntimeSettings

from . import syscalls
from .syscalls import in_child

pytestmark = pytest.mark.numa


def layout_of(settings: RuntimeSettings | None = None) -> RuntimeLayout:
    return RuntimeLayout.from_platform(Platform.detect(), settings)


@pytest.fixture(scope="module")
def runtime() -> native.Runtime:
    return native.Runtime(layout_of())


def everywhere(runtime: native.Runtime) -> tuple[int, ...]:
    return tuple(range(len(runtime.layout.nodes)))


def check_places(layout: RuntimeLayout, places: list) -> None:
    """Each worker on a CPU of its own, within the CPUs that its node pins to."""
    assert len(places) == sum(node.threads for node in layout.nodes)
    for place in places:
        node = layout.nodes[place.node]
        assert place.os_node == node.os_node
        assert place.cpu in node.cpus[: node.threads]
    assert len({place.cpu for place in places}) == len(places)


def test_workers_run_on_their_own_nodes(runtime):
    for _ in range(20):
        check_places(runtime.layout, runtime.observe_workers(everywhere(runtime)))


def test_a_call_on_one_node_runs_there_only(runtime):
    for index, node in enumerate(runtime.layout.nodes):
        places = runtime.observe_workers((index,))
        assert {place.os_node for place in places} == {node.os_node}
        assert len(places) == node.threads


def test_the_callers_mask_is_as_it_was(runtime, topology):
    everything = os.sched_getaffinity(0)
    runtime.observe_workers(everywhere(runtime))
    assert os.sched_getaffinity(0) == everything
    # a caller that sits on another node than the first of the call
    with syscalls.pinned(topology.cpus_of(runtime.layout.nodes[-1].os_node)):
        before = os.sched_getaffinity(0)
        check_places(runtime.layout, runtime.observe_workers(everywhere(runtime)))
        assert os.sched_getaffinity(0) == before
    with pytest.raises(RuntimeError, match="planted"):
        runtime.native.fail_in_worker(list(everywhere(runtime)), 0, "planted")
    assert os.sched_getaffinity(0) == everything


def test_pool_threads_are_pinned_to_one_cpu_each(runtime):
    runtime.observe_workers(everywhere(runtime))
    masks = [mask for thread, mask in syscalls.thread_cpus().items() if thread != os.getpid() and len(mask) == 1]
    pinned_to = sorted(cpu for mask in masks for cpu in mask)
    expected = sorted(cpu for node in runtime.layout.nodes for cpu in node.cpus[: node.threads])
    assert set(pinned_to) <= set(expected)
    # the caller takes one slot of the first node itself
    assert len(expected) - 1 <= len(pinned_to) <= len(expected)


def test_threads_made_after_a_call_may_run_anywhere(runtime):
    """A thread inherits its maker's mask: torch's pool would sit on one CPU."""
    seen: list[set[int]] = []
    runtime.observe_workers(everywhere(runtime))
    thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert seen == [os.sched_getaffinity(0)]


def test_two_callers_are_served_at_once_each_on_its_own_node(runtime, full_nodes):
    other = threading.Thread(target=runtime.native.keep_busy, args=([0], 2.0))
    other.start()
    time.sleep(0.3)
    begin = time.monotonic()
    runtime.observe_workers((1,))
    assert time.monotonic() - begin < 1.0
    runtime.observe_workers((0,))  # the control: on the busy node one waits
    assert time.monotonic() - begin > 1.2
    other.join()


def test_a_fork_after_use_works(runtime):
    runtime.observe_workers(everywhere(runtime))

    def in_the_child() -> list[tuple[int, int]]:
        return [(place.node, place.os_node) for place in runtime.observe_workers(everywhere(runtime))]

    places = in_child(in_the_child)
    assert all(runtime.layout.nodes[node].os_node == os_node for node, os_node in places)
    assert len(places) == sum(node.threads for node in runtime.layout.nodes)
    check_places(runtime.layout, runtime.observe_workers(everywhere(runtime)))


def test_an_idle_pool_uses_no_cpu(runtime):
    runtime.observe_workers(everywhere(runtime))
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(3)
    assert time.process_time() - before < 0.03 * 3


def test_a_narrowed_mask_is_kept_to(topology, full_nodes):
    cpus = (topology.cpus_of(full_nodes[0])[-1], topology.cpus_of(full_nodes[-1])[0])

    def narrowed() -> tuple[list[int], set[int]]:
        os.sched_setaffinity(0, cpus)
        runtime = native.Runtime(layout_of())
        places = runtime.observe_workers(everywhere(runtime))
        return [place.cpu for place in places], os.sched_getaffinity(0)

    assert in_child(narrowed) == ([*cpus], set(cpus))


def test_more_threads_than_cores_go_to_the_siblings(lab):
    if lab.threads_per_core == 1:
        pytest.skip("this topology has no SMT")
    per_node = min(len(lab.cpus_of(node)) for node in lab.with_cpus)

    def crowded() -> list[int]:
        layout = layout_of(RuntimeSettings(threads_per_node=per_node))
        runtime = native.Runtime(layout)
        places = runtime.observe_workers(everywhere(runtime))
        check_places(layout, places)
        return [place.cpu for place in places]

    assert sorted(in_child(crowded)) == list(lab.all_cpus)


def test_two_runtimes_that_split_the_same_cpus_differently_are_an_error(runtime):
    layout = runtime.layout
    if layout.nodes[0].threads < 2:
        pytest.skip("one thread a node")
    other = RuntimeSettings(threads_per_node=1)
    with pytest.raises(ConfigurationError):
        native.Runtime(layout_of(other))
