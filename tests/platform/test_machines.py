"""Machines of every kind that numagraft is made for, read from the files their kernels would show."""

from __future__ import annotations

import time

import pytest

from numagraft.placement import PlacementSpec, resolve
from numagraft.platform import Platform
from numagraft.platform.tree import MemoryTree
from numagraft.runtime import RuntimeLayout, RuntimeSettings
from tests.topologies import machines
from tests.topologies.machines import GIB, MACHINES, Machine, NodeFacts


class Units:
    count, multiple, packed_bytes = 4096, 16, 8 * GIB


#: name -> sockets, nodes, usable nodes, nodes per socket, cores, CPUs, ISA
EXPECTED = {
    "dual-xeon-e5-2680v4": (2, 2, 2, 1, 28, 56, "avx2"),
    "dual-xeon-8480-snc4": (2, 8, 8, 4, 112, 224, "amx"),
    "dual-epyc-9654-nps1": (2, 2, 2, 1, 192, 384, "avx512_vnni"),
    "dual-epyc-9654-nps4": (2, 8, 8, 4, 192, 384, "avx512_vnni"),
    "dual-xeon-max-9480-flat": (2, 16, 8, 4, 112, 224, "amx"),
    "grace-superchip": (2, 2, 2, 1, 144, 144, "scalar"),
    "dual-xeon-6980p-snc3": (2, 6, 6, 3, 256, 512, "amx"),
    "dual-xeon-cxl": (2, 3, 2, 1, 64, 128, "amx"),
    "one-node": (1, 1, 1, 1, 8, 16, "avx512_vnni"),
    "dual-xeon-cgroup-v2": (2, 2, 1, 1, 7, 14, "avx2"),
    "dual-xeon-cgroup-v1": (2, 2, 1, 1, 14, 28, "avx2"),
    "dual-epyc-gpus": (2, 2, 2, 1, 192, 384, "avx512_vnni"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_shape(name):
    platform = machines.platform(name)
    sockets, nodes, usable, per_socket, cores, cpus, isa = EXPECTED[name]
    assert len(platform.sockets) == sockets
    assert len(platform.nodes) == nodes
    assert len(platform.usable_nodes) == usable
    assert platform.nodes_per_socket == per_socket
    assert len(platform.cores()) == cores
    assert len(platform.allowed_cpus) == cpus
    assert platform.isa[0] == isa
    assert platform.notes == ()
    assert Platform.from_json(platform.to_json()) == platform


@pytest.mark.parametrize("name", MACHINES)
def test_files_on_disk_say_the_same(name, tmp_path):
    read = Platform.detect(machines.write(name, tmp_path))
    assert read.nodes == machines.platform(name).nodes
    assert read.cpus == machines.platform(name).cpus
    assert not read.live


@pytest.mark.parametrize("name", MACHINES)
def test_layout_takes_every_usable_core(name):
    platform = machines.platform(name)
    layout = RuntimeLayout.from_platform(platform)
    quota = platform.cgroup.cpu_quota
    assert sum(node.threads for node in layout.nodes) == (int(quota) if quota else EXPECTED[name][4])
    assert not layout.bound
    cores = {cpu.id: cpu.core for cpu in platform.cpus}
    for node in layout.nodes:
        pinned = [cores[cpu] for cpu in node.cpus[: node.threads]]
        assert len(set(pinned)) == len(pinned), "two threads on one core"
    assert resolve(PlacementSpec("shard"), Units, layout).replicas == 1


def test_snc_and_nps_mirror_once_per_socket():
    for name in ("dual-xeon-8480-snc4", "dual-epyc-9654-nps4", "dual-xeon-6980p-snc3"):
        layout = RuntimeLayout.from_platform(machines.platform(name))
        assert resolve(PlacementSpec("mirror"), Units, layout).replicas == len(layout.nodes)
        assert resolve(PlacementSpec("mirror", per="socket"), Units, layout).replicas == 2


def test_uneven_nodes_get_uneven_shards():
    layout = RuntimeLayout.from_platform(machines.platform("dual-xeon-6980p-snc3"))
    sizes = [part.end - part.begin for part in resolve(PlacementSpec("shard"), Units, layout).parts]
    assert sum(sizes) == 4096
    assert [node.threads for node in layout.nodes] == [43, 43, 42, 43, 43, 42]
    assert sizes[0] >= sizes[2]


def test_epyc_l3_groups():
    platform = machines.platform("dual-epyc-9654-nps4")
    groups = {cpu.l3 for cpu in platform.cpus}
    assert len(groups) == 24
    layout = RuntimeLayout.from_platform(platform, RuntimeSettings(threads_per_node=3))
    l3_of = {cpu.id: cpu.l3 for cpu in platform.cpus}
    assert len({l3_of[cpu] for cpu in layout.nodes[0].cpus[:3]}) == 3


def test_hbm_in_flat_mode():
    platform = machines.platform("dual-xeon-max-9480-flat")
    assert platform.memory_only_nodes == tuple(range(8, 16))
    assert platform.node(12).socket == 1
    assert platform.node(8).read_mb_per_s == 200000
    listed = RuntimeLayout.from_platform(platform, RuntimeSettings(nodes=tuple(range(16))))
    on_hbm = resolve(PlacementSpec("shard", nodes=tuple(range(8, 16))), Units, listed)
    assert [(part.memory_nodes, part.worker_nodes) for part in on_hbm.parts] == [((i + 8,), (i,)) for i in range(8)]


def test_cxl_memory_is_used_only_when_listed():
    platform = machines.platform("dual-xeon-cxl")
    assert platform.memory_only_nodes == (3,)
    assert [node.os_node for node in RuntimeLayout.from_platform(platform).nodes] == [0, 1]
    listed = RuntimeLayout.from_platform(platform, RuntimeSettings(nodes=(0, 1, 3)))
    assert [(node.os_node, node.threads) for node in listed.nodes] == [(0, 32), (1, 32), (3, 0)]


def test_grace_has_no_x86_rows():
    platform = machines.platform("grace-superchip")
    assert (platform.cpu.arch, platform.cpu.vendor, platform.cpu.model) == ("aarch64", "ARM", "Neoverse V2")
    assert platform.supports("i8mm") and not platform.supports("avx2")


def test_cgroup_v2():
    platform = machines.platform("dual-xeon-cgroup-v2")
    group = platform.cgroup
    assert (group.version, group.memory_limit, group.memory_used) == (2, 32 * GIB, 8 * GIB)
    assert group.memory_available == 26 * GIB
    assert (group.cpu_quota, group.mems) == (4.0, (0,))
    assert platform.allowed_nodes == (0,)
    assert platform.available_bytes() == {0: 26 * GIB}
    assert platform.seccomp == 2


def test_cgroup_v1_inside_a_container():
    platform = machines.platform("dual-xeon-cgroup-v1")
    group = platform.cgroup
    assert (group.version, group.memory_limit, group.memory_available) == (1, 64 * GIB, 61 * GIB)
    assert (group.cpu_quota, group.cpus, group.mems) == (None, (*range(14, 28), *range(42, 56)), (1,))
    assert platform.usable_nodes == (1,)


@pytest.mark.parametrize(
    ("share", "period", "quota"),
    [("250000", "100000", 2.5), ("5000", "10000", 0.5), ("-1", "100000", None), ("x", "", None)],
)
def test_cgroup_v1_cpu_quota(share, period, quota):
    folder = "/sys/fs/cgroup/cpu,cpuacct"
    changed = {f"{folder}/cpu.cfs_quota_us": share, f"{folder}/cpu.cfs_period_us": period}
    machine = MACHINES["dual-xeon-cgroup-v1"].with_files(**changed)
    platform = Platform.read(MemoryTree(machines.files(machine)))
    assert platform.cgroup.cpu_quota == quota
    layout = RuntimeLayout.from_platform(platform)
    assert sum(node.threads for node in layout.nodes) == (max(1, int(quota)) if quota else 14)


def test_the_tightest_cpu_quota_of_the_nested_groups_counts():
    folder = "/sys/fs/cgroup/kubepods.slice/pod1"
    machine = MACHINES["dual-xeon-cgroup-v2"].with_files(**{f"{folder}/run/cpu.max": "150000 50000"})
    assert Platform.read(MemoryTree(machines.files(machine))).cgroup.cpu_quota == 3.0


def test_gpus():
    first, second = machines.platform("dual-epyc-gpus").gpus
    assert (first.address, first.vendor, first.device, first.node) == (
        "0000:21:00.0",
        "nvidia",
        "NVIDIA H100 80GB HBM3",
        0,
    )
    assert (second.device, second.node) == ("0x2330", 1)
    assert first.memory_bytes is None  # the window on the bus is 128 GiB, the memory 80
    assert first.link == "32.0 GT/s PCIe x16"
    assert first.driver == "nvidia"
    assert 0 in first.cpus and 96 in second.cpus


def test_sparse_nodes_and_offline_cpus():
    facts = tuple(NodeFacts(4, GIB, socket, id=id) for id, socket in ((1, 0), (6, 1)))
    machine = Machine(facts, ((10, 20), (20, 10)), offline=(3, 11, 12))
    platform = Platform.read(MemoryTree(machines.files(machine)))
    assert [node.id for node in platform.nodes] == [1, 6]
    assert platform.node(6).distances == {1: 20, 6: 10}
    assert [cpu.id for cpu in platform.cpus if not cpu.online] == [3, 11, 12]
    assert platform.cores(1) == ((0, 8), (1, 9), (2, 10))
    assert platform.cores(6) == ((4,), (5, 13), (6, 14), (7, 15))
    layout = RuntimeLayout.from_platform(platform)
    assert [node.os_node for node in layout.nodes] == [1, 6]
    assert layout.index_of(6) == 1


def test_thousands_of_cpus():
    """32 nodes of 128 cores of 2 threads."""
    nodes = tuple(NodeFacts(128, 64 * GIB, node // 4) for node in range(32))
    huge = Machine(nodes, far_and_near(), cores_per_l3=16)
    tree = MemoryTree(machines.files(huge))
    started = time.perf_counter()
    platform = Platform.read(tree)
    seconds = time.perf_counter() - started
    assert len(platform.allowed_cpus) == 8192
    assert len(platform.cores()) == 4096
    assert platform.cores(31)[-1] == (4095, 8191)
    assert {len(platform.cores(node)) for node in range(32)} == {128}
    assert len({cpu.l3 for cpu in platform.cpus}) == 256
    assert platform.nodes_per_socket == 4
    assert seconds < 5


def far_and_near() -> tuple[tuple[int, ...], ...]:
    return machines.far_and_near(8, 4, near=12, far=32)


def test_detecting_this_machine_is_quick():
    times = []
    for _ in range(5):
        started = time.perf_counter()
        here = Platform.detect()
        times.append(time.perf_counter() - started)
    assert here.live
    assert min(times) < 0.05
