"""Dumps of real machines say what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from numagraft.platform import Platform

TOPOLOGIES = Path(__file__).resolve().parent.parent / "topologies"
GIB = 1 << 30


def hwloc(name: str) -> Platform:
    return Platform.from_dump(TOPOLOGIES / "hwloc" / name)


def lab(name: str) -> Platform:
    return Platform.from_dump(TOPOLOGIES / "lab" / f"{name}.tar.xz")


def offline(platform: Platform) -> list[int]:
    return [cpu.id for cpu in platform.cpus if not cpu.online]


def test_16amd64_8n2c():
    """8 nodes of 2 cores; an old kernel that writes masks."""
    platform = hwloc("16amd64-8n2c.tar.bz2")
    assert [node.cpus for node in platform.nodes] == [(2 * i, 2 * i + 1) for i in range(8)]
    assert len(platform.cores()) == 16
    assert platform.sockets == tuple(range(8))
    assert platform.nodes_per_socket == 1
    assert platform.cpu.vendor == "AMD"
    assert platform.isa == ("scalar",)
    assert not platform.live
    assert {(a.id == b, d) for a in platform.nodes for b, d in a.distances.items()} == {(True, 10), (False, 20)}


def test_16em64t_4s2c2t_offlines():
    """4 sockets of 2 cores of 2 threads, 4 CPUs offline; a kernel that lists neither CPUs nor nodes."""
    platform = hwloc("16em64t-4s2c2t-offlines.tar.bz2")
    assert len(platform.nodes) == 1
    assert platform.sockets == (0, 1, 2, 3)
    assert offline(platform) == [2, 5, 13, 14]
    assert platform.cores() == ((0, 8), (1, 9), (3, 11), (4, 12), (6,), (7, 15), (10,))
    assert platform.allowed_cpus == platform.nodes[0].cpus
    assert {cpu.id: cpu.socket for cpu in platform.cpus if cpu.online}[6] == 2


def test_32em64t_2n8c():
    """2 nodes of 8 cores, of 32 present threads 16 online; memory slots in the firmware's tables."""
    platform = hwloc("32em64t-2n8c+dax+nvme+mic+dimms.tar.bz2")
    assert [node.cpus for node in platform.nodes] == [tuple(range(8)), tuple(range(8, 16))]
    assert platform.nodes[0].distances == {0: 10, 1: 21}
    assert [len(platform.cores(node)) for node in (0, 1)] == [8, 8]
    assert {cpu.l3 for cpu in platform.cpus if cpu.online} == {0, 8}
    assert platform.cpu.model == "Intel(R) Xeon(R) CPU E5-2680 0 @ 2.70GHz"
    assert platform.isa == ("scalar",)  # AVX without AVX2
    assert platform.kernel.governors == ("performance",)
    assert platform.gpus == ()  # its coprocessor is no GPU, its display no place to compute
    modules = platform.memory_modules
    assert len(modules) == 24
    assert {module.bytes for module in modules} == {0, 4 * GIB}
    assert sum(module.bytes for module in modules) == 32 * GIB


def test_64amd64_4s2n4ca2co():
    """4 sockets, 2 nodes each, 4 pairs of cores that share a module."""
    platform = hwloc("64amd64-4s2n4ca2co.tar.bz2")
    assert platform.sockets == (0, 1, 2, 3)
    assert platform.nodes_per_socket == 2
    assert [node.socket for node in platform.nodes] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [len(node.cpus) for node in platform.nodes] == [8] * 8
    assert len(platform.cores(0)) == 4
    assert platform.nodes[0].distances[3] == 22
    assert platform.nodes[5].total_bytes < platform.nodes[4].total_bytes


def test_offline_cpu0_node0():
    """CPU 0 and node 0 are offline; CPUs of the lost node are named and left alone."""
    platform = hwloc("offline-cpu0-node0.tar.bz2")
    assert [node.id for node in platform.nodes] == [1]
    assert platform.nodes[0].cpus == (5, 7, 9, 11, 13, 15, 17, 19)
    assert platform.nodes[0].total_bytes == 64 * GIB
    assert platform.usable_nodes == (1,)
    assert 0 in offline(platform) and 21 in offline(platform)
    assert platform.notes == ("CPUs 4,6,8,10,12,14,16,18,20 belong to no online node and are left alone",)
    assert platform.isa == ("avx2", "scalar")
    assert platform.cgroup.mems == (1,)
    assert [pages.page_bytes for pages in platform.nodes[0].huge_pages] == [2 << 20, 1 << 30]


@pytest.mark.parametrize(
    ("name", "nodes", "cores", "cpus"), [("2n2c", 2, 4, 4), ("2n4c-smt", 2, 4, 8), ("8n1c", 8, 8, 8)]
)
def test_lab_machines(name, nodes, cores, cpus):
    platform = lab(name)
    assert platform.usable_nodes == tuple(range(nodes))
    assert len(platform.cores()) == cores
    assert len(platform.allowed_cpus) == cpus
    assert all(node.total_bytes > 200 << 20 for node in platform.nodes)


def test_lab_cxl():
    """Node 2 has no memory, node 3 no CPUs; it belongs to the socket it is nearest to."""
    platform = lab("cxl")
    assert platform.usable_nodes == (0, 1)
    assert platform.memory_only_nodes == (3,)
    assert platform.allowed_nodes == (0, 1, 3)
    assert [node.socket for node in platform.nodes] == [0, 1, 2, 0]
    assert platform.nodes[2].distances == {0: 28, 1: 17, 2: 10, 3: 40}


@pytest.mark.parametrize("path", sorted(TOPOLOGIES.glob("*/*.tar.*")), ids=lambda path: path.name)
def test_json_keeps_everything(path):
    platform = Platform.from_dump(path)
    assert Platform.from_json(platform.to_json()) == platform
