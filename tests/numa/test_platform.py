"""What numagraft says of a machine, against what the machine was made to be."""

from __future__ import annotations

import errno
import os

import pytest

from numagraft import native
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout

from . import syscalls
from .control_groups import control_group, join
from .syscalls import BIND, INTERLEAVE, MIB, in_child

pytestmark = pytest.mark.numa


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform.detect()


def test_nodes_cpus_and_distances(lab, platform):
    assert platform.live
    assert tuple(node.id for node in platform.nodes) == lab.online
    for node in platform.nodes:
        assert node.cpus == lab.cpus_of(node.id)
        assert node.has_memory == (node.id in lab.with_memory)
        assert node.distances == {other: lab.distance(node.id, other) for other in lab.online}
        if node.cpus:
            assert node.socket == lab.socket_of(node.id)
    assert platform.allowed_cpus == tuple(cpu for cpu in lab.all_cpus if cpu not in lab.offline)
    assert platform.allowed_nodes == lab.with_memory
    assert platform.usable_nodes == tuple(n for n in lab.with_memory if n in lab.with_cpus)
    assert platform.memory_only_nodes == tuple(n for n in lab.with_memory if n not in lab.with_cpus)
    assert {cpu.id for cpu in platform.cpus if not cpu.online} == set(lab.offline)


def test_cores_sockets_and_nodes_per_socket(lab, platform):
    for node in lab.with_cpus:
        expected = sorted({lab.siblings_of(cpu) for cpu in lab.cpus_of(node)})
        assert list(platform.cores(node)) == expected
    sockets = [lab.socket_of(node) for node in lab.with_cpus]
    assert platform.sockets == tuple(sorted(set(sockets)))
    assert platform.nodes_per_socket == max(sockets.count(socket) for socket in sockets)


def test_memory_is_what_the_nodes_have(lab, platform):
    for node in platform.nodes:
        mib = lab.nodes[node.id].mib
        kernels = max(128, mib // 16)  # what it holds from the start, and the descriptors of all pages
        assert (mib - kernels) * MIB <= node.total_bytes <= mib * MIB if mib else node.total_bytes == 0
        assert node.free_bytes <= node.total_bytes
        assert abs(node.free_bytes - syscalls.node_free(node.id)) < 64 * MIB
        reserved = {pages.page_bytes: pages.total for pages in node.huge_pages}
        assert reserved.get(2 * MIB, 0) == (lab.huge_2m if mib else 0)


def test_kernel_settings(lab, platform):
    assert platform.kernel.numa_balancing == lab.numa_balancing
    assert platform.kernel.transparent_hugepage == "madvise"
    assert platform.policy.is_default


def test_it_survives_json(platform):
    again = Platform.from_json(platform.to_json())
    assert not again.live
    assert (again.nodes, again.cpus, again.allowed_nodes) == (platform.nodes, platform.cpus, platform.allowed_nodes)


def test_an_affinity_mask_narrows_it(topology, usable_nodes):
    node = usable_nodes[-1]
    cpu = topology.cpus_of(node)[0]

    def narrowed() -> Platform:
        os.sched_setaffinity(0, [cpu])
        return Platform.detect()

    seen = in_child(narrowed)
    assert seen.allowed_cpus == (cpu,)
    assert seen.usable_nodes == (node,)
    assert seen.allowed_nodes == topology.with_memory


def test_a_cpuset_is_believed_over_sysfs(lab, full_nodes):
    node = full_nodes[-1]
    cpus = lab.cpus_of(node)

    def inside() -> Platform:
        join(group)
        return Platform.detect()

    settings = {"cpuset_cpus": ",".join(map(str, cpus)), "cpuset_mems": str(node)}
    with control_group("narrow", **settings) as group:
        seen = in_child(inside)
    assert (seen.allowed_nodes, seen.allowed_cpus, seen.usable_nodes) == ((node,), cpus, (node,))
    assert tuple(n.id for n in seen.nodes) == lab.online


def test_a_memory_limit_is_found(lab):
    def inside() -> Platform:
        join(group)
        return Platform.detect()

    with control_group("small", memory_max=str(64 * MIB)) as group:
        seen = in_child(inside)
    assert seen.cgroup.version == 2
    assert seen.cgroup.memory_limit == 64 * MIB
    assert all(amount <= 64 * MIB for amount in seen.available_bytes().values())


def test_a_cpu_quota_is_found_and_kept_to(lab):
    cores = sum(len({lab.siblings_of(cpu) for cpu in lab.cpus_of(node)}) for node in lab.with_cpus if node in lab.with_memory)

    def inside() -> tuple[float | None, int]:
        join(group)
        platform = Platform.detect()
        layout = RuntimeLayout.from_platform(platform)
        runtime = native.Runtime(layout)
        places = runtime.observe_workers()
        assert len(places) == sum(node.threads for node in layout.nodes)
        return platform.cgroup.cpu_quota, len(places)

    for quota in (1, cores + 1):
        with control_group("paid", cpu_max=f"{quota * 100000} 100000") as group:
            assert in_child(inside) == (quota, min(quota, cores))


@pytest.mark.parametrize(("mode", "name"), [(INTERLEAVE, "interleave"), (BIND, "bind")])
def test_an_inherited_policy_is_told(usable_nodes, mode, name):
    def under_policy() -> Platform:
        syscalls.set_mempolicy(mode, usable_nodes[:2])
        return Platform.detect()

    seen = in_child(under_policy)
    assert (seen.policy.mode, seen.policy.nodes) == (name, usable_nodes[:2])
    assert not seen.policy.is_default


def test_a_refused_policy_query_is_not_taken_for_no_policy(usable_nodes):
    def under_filter() -> Platform:
        syscalls.set_mempolicy(INTERLEAVE, usable_nodes[:2])
        syscalls.refuse("get_mempolicy", "set_mempolicy", "mbind", "move_pages", errno=errno.EPERM)
        return Platform.detect()

    seen = in_child(under_filter)
    assert seen.policy.mode in ("interleave", "unknown")
    assert seen.policy.mode == "interleave" or seen.policy.note
