"""The ground the other tests stand on: the machine is what its table entry says, and the page query tells nodes apart."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest

from . import syscalls
from .syscalls import BIND, INTERLEAVE, MIB, PAGE, anonymous, in_child, mbind, pages_by_node, pinned, touch

pytestmark = pytest.mark.numa


def test_the_machine_is_the_topology_asked_for(lab):
    nodes = syscalls.NODES
    assert syscalls.parse_list((nodes / "online").read_text()) == lab.online
    assert syscalls.parse_list((nodes / "has_memory").read_text()) == lab.with_memory
    assert syscalls.parse_list((nodes / "has_cpu").read_text()) == lab.with_cpus
    for node in lab.online:
        assert syscalls.parse_list((nodes / f"node{node}/cpulist").read_text()) == lab.cpus_of(node)
        distances = [lab.distance(node, other) for other in lab.online]
        assert [int(word) for word in (nodes / f"node{node}/distance").read_text().split()] == distances
        for cpu in lab.cpus_of(node):
            sysfs = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            assert int((sysfs / "physical_package_id").read_text()) == lab.socket_of(node)
            assert syscalls.parse_list((sysfs / "thread_siblings_list").read_text()) == lab.siblings_of(cpu)
    assert int(Path("/proc/sys/kernel/numa_balancing").read_text()) == lab.numa_balancing


def test_a_bound_page_lies_where_it_was_bound(memory_nodes):
    for node in memory_nodes:
        with anonymous(MIB) as address:
            mbind(address, MIB, BIND, [node])
            touch(address, MIB)
            assert pages_by_node(address, MIB) == {node: MIB // PAGE}


def test_an_interleaved_area_is_even(memory_nodes):
    size = 64 * len(memory_nodes) * PAGE
    with anonymous(size) as address:
        mbind(address, size, INTERLEAVE, memory_nodes)
        touch(address, size)
        assert pages_by_node(address, size) == dict.fromkeys(memory_nodes, 64)


def test_an_untouched_page_is_nowhere():
    with anonymous(PAGE) as address:
        (node,) = syscalls.page_nodes(address, PAGE)
        assert node in (-errno.ENOENT, -errno.EFAULT)


def test_first_touch_follows_the_cpu(topology, usable_nodes):
    for node in usable_nodes:
        with anonymous(MIB) as address, pinned(topology.cpus_of(node)):
            assert syscalls.getcpu()[1] == node
            touch(address, MIB)
            assert pages_by_node(address, MIB) == {node: MIB // PAGE}


def test_a_filter_in_a_child_refuses_there_and_only_there(memory_nodes):
    def bind_refused() -> int | None:
        syscalls.refuse("mbind", errno=errno.EPERM)
        with anonymous(PAGE) as address:
            try:
                mbind(address, PAGE, BIND, memory_nodes[:1])
            except OSError as error:
                return error.errno
        return None

    assert in_child(bind_refused) == errno.EPERM
    with anonymous(PAGE) as address:
        mbind(address, PAGE, BIND, memory_nodes[:1])


def test_what_a_child_does_is_told():
    assert in_child(lambda: 6 * 7) == 42
    with pytest.raises(ZeroDivisionError):
        in_child(lambda: 1 // 0)
    with pytest.raises(syscalls.ChildKilled, match="SIGKILL"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TimeoutError, match=re.escape("after 0.5 s")):
        in_child(lambda: signal.pause(), seconds=0.5)
