"""Machines that are made up: sysfs and procfs built from a description, as their kernels would show them.

`tree(name)` is one for `Platform.read`; `write(name, folder)` puts the files on disk; `python -m tests.topologies.machines FOLDER`
writes them all. Facts of the real models: core counts, node layout, distances and feature flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from numagraft.platform import Platform
from numagraft.platform.ids import format_list
from numagraft.platform.tree import MemoryTree

GIB = 1 << 30

AVX2 = "fpu sse sse2 ht lm ssse3 sse4_1 sse4_2 avx f16c fma bmi1 bmi2 avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"
ZEN4 = f"{AVX512} avx512_bf16 avx512_vnni avx512ifma avx512vbmi vaes"
SAPPHIRE = f"{AVX512} avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_int8 amx_bf16"
NEOVERSE_V2 = "fp asimd evtstrm aes atomics fphp asimdhp asimddp sve asimdfhm sve2 svei8mm svebf16 i8mm bf16"


@dataclass(frozen=True)
class NodeFacts:
    """`cores` physical cores; a node without cores has memory only."""

    cores: int
    memory: int
    socket: int
    id: int | None = None
    free: int | None = None
    huge_2m: int = 0
    claims: tuple[int, int] | None = None  # MB/s and ns of reads, from the HMAT


@dataclass(frozen=True)
class Machine:
    """`distances` of nodes in order; `cores_per_l3` 0: one L3 per socket; SMT siblings are numbered after all cores."""

    nodes: tuple[NodeFacts, ...]
    distances: tuple[tuple[int, ...], ...]
    vendor: str = "GenuineIntel"
    model: str = ""
    flags: str = AVX2
    threads_per_core: int = 2
    cores_per_l3: int = 0
    offline: tuple[int, ...] = ()
    arm: bool = False
    files: dict[str, str] = field(default_factory=dict)

    def with_files(self, **files: str) -> Machine:
        return replace(self, files={**self.files, **files})


def far_and_near(sockets: int, per_socket: int, *, near: int, far: int) -> tuple[tuple[int, ...], ...]:
    """10 on the diagonal, `near` inside a socket, `far` between sockets."""
    count = sockets * per_socket
    return tuple(
        tuple(10 if a == b else near if a // per_socket == b // per_socket else far for b in range(count))
        for a in range(count)
    )


def _xeon_max() -> Machine:
    """Flat mode, SNC4: nodes 0-7 have cores and DDR5, 8-15 the HBM2e beside each of them."""
    rows = []
    for a in range(16):
        same = [10 if a == b else 13 if a % 8 == b % 8 else None for b in range(16)]
        rows.append(
            tuple(
                d if d is not None else (12 if a % 8 // 4 == b % 8 // 4 else 21) + (2 if max(a, b) >= 8 else 0)
                for b, d in enumerate(same)
            )
        )
    ddr = [NodeFacts(14, 64 * GIB, node // 4, claims=(76000, 110)) for node in range(8)]
    hbm = [NodeFacts(0, 16 * GIB, node // 4, claims=(200000, 130)) for node in range(8)]
    return Machine((*ddr, *hbm), tuple(rows), model="Intel(R) Xeon(R) CPU Max 9480", flags=SAPPHIRE)


MACHINES: dict[str, Machine] = {
    "dual-xeon-e5-2680v4": Machine(
        tuple(NodeFacts(14, 128 * GIB, socket) for socket in range(2)),
        ((10, 21), (21, 10)),
        model="Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz",
    ),
    "dual-xeon-8480-snc4": Machine(
        tuple(NodeFacts(14, 128 * GIB, node // 4) for node in range(8)),
        far_and_near(2, 4, near=12, far=21),
        model="Intel(R) Xeon(R) Platinum 8480+",
        flags=SAPPHIRE,
    ),
    "dual-epyc-9654-nps1": Machine(
        tuple(NodeFacts(96, 384 * GIB, socket) for socket in range(2)),
        ((10, 32), (32, 10)),
        vendor="AuthenticAMD",
        model="AMD EPYC 9654 96-Core Processor",
        flags=ZEN4,
        cores_per_l3=8,
    ),
    "dual-epyc-9654-nps4": Machine(
        tuple(NodeFacts(24, 96 * GIB, node // 4) for node in range(8)),
        far_and_near(2, 4, near=12, far=32),
        vendor="AuthenticAMD",
        model="AMD EPYC 9654 96-Core Processor",
        flags=ZEN4,
        cores_per_l3=8,
    ),
    "dual-xeon-max-9480-flat": _xeon_max(),
    "grace-superchip": Machine(
        tuple(NodeFacts(72, 240 * GIB, socket) for socket in range(2)),
        ((10, 40), (40, 10)),
        vendor="0x41",
        model="0xd4f",
        flags=NEOVERSE_V2,
        threads_per_core=1,
        arm=True,
    ),
    # Granite Rapids with SNC3: the cores of a socket do not divide by three.
    "dual-xeon-6980p-snc3": Machine(
        tuple(NodeFacts(cores, 128 * GIB, socket) for socket in range(2) for cores in (43, 43, 42)),
        far_and_near(2, 3, near=12, far=21),
        model="Intel(R) Xeon(R) 6980P",
        flags=SAPPHIRE,
    ),
    "dual-xeon-cxl": Machine(
        (
            NodeFacts(32, 256 * GIB, 0, claims=(250000, 100)),
            NodeFacts(32, 256 * GIB, 1, claims=(250000, 100)),
            NodeFacts(0, 512 * GIB, 0, id=3, claims=(30000, 250)),
        ),
        ((10, 21, 14), (21, 10, 24), (14, 24, 10)),
        model="Intel(R) Xeon(R) Gold 6548Y+",
        flags=SAPPHIRE,
    ),
    "one-node": Machine(
        (NodeFacts(8, 64 * GIB, 0),),
        ((10,),),
        vendor="AuthenticAMD",
        model="AMD Ryzen 7 7700",
        flags=ZEN4,
        cores_per_l3=8,
    ),
}
MACHINES["dual-xeon-cgroup-v2"] = MACHINES["dual-xeon-e5-2680v4"].with_files(
    **{
        "/proc/self/cgroup": "0::/kubepods.slice/pod1/run\n",
        "/proc/self/mountinfo": "31 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
        "/proc/self/status": "Cpus_allowed_list:\t0-6,28-34\nMems_allowed_list:\t0\nSeccomp:\t2\n",
        "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu memory",
        "/sys/fs/cgroup/kubepods.slice/memory.max": str(100 * GIB),
        "/sys/fs/cgroup/kubepods.slice/pod1/memory.max": str(32 * GIB),
        "/sys/fs/cgroup/kubepods.slice/pod1/memory.current": str(8 * GIB),
        "/sys/fs/cgroup/kubepods.slice/pod1/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {GIB}\n",
        "/sys/fs/cgroup/kubepods.slice/pod1/cpu.max": "400000 100000",
        "/sys/fs/cgroup/kubepods.slice/pod1/run/memory.max": "max",
        "/sys/fs/cgroup/kubepods.slice/pod1/run/cpu.max": "max 100000",
        "/sys/fs/cgroup/kubepods.slice/pod1/run/cpuset.cpus.effective": "0-6,28-34",
        "/sys/fs/cgroup/kubepods.slice/pod1/run/cpuset.mems.effective": "0",
    }
)
MACHINES["dual-xeon-cgroup-v1"] = MACHINES["dual-xeon-e5-2680v4"].with_files(
    **{
        "/proc/self/cgroup": "5:memory:/docker/abc\n4:cpuset:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        # Inside the container its own group is mounted as the root of each hierarchy.
        "/proc/self/mountinfo": "".join(
            f"{40 + i} 30 0:{26 + i} /docker/abc /sys/fs/cgroup/{name} ro - cgroup cgroup rw,{name}\n"
            for i, name in enumerate(("memory", "cpuset", "cpu,cpuacct"))
        ),
        "/proc/self/status": "Cpus_allowed_list:\t14-27,42-55\nMems_allowed:\t00000000,00000002\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(64 * GIB),
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(4 * GIB),
        "/sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_active_file {GIB}\ntotal_inactive_file 0\n",
        "/sys/fs/cgroup/cpuset/cpuset.cpus": "14-27,42-55",
        "/sys/fs/cgroup/cpuset/cpuset.mems": "1",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
)
MACHINES["dual-epyc-gpus"] = MACHINES["dual-epyc-9654-nps1"].with_files(
    **{
        f"/sys/bus/pci/devices/{address}/{name}": value
        for address, node, cpus in (("0000:21:00.0", 0, "0-95,192-287"), ("0000:c1:00.0", 1, "96-191,288-383"))
        for name, value in {
            "class": "0x030200",
            "vendor": "0x10de",
            "device": "0x2330",
            "numa_node": str(node),
            "local_cpulist": cpus,
            "uevent": "DRIVER=nvidia\nPCI_CLASS=30200",
            "resource": "0x00 0x00 0x00\n0x0000008000000000 0x0000009fffffffff 0x000000000014220c",
            "current_link_speed": "32.0 GT/s PCIe",
            "current_link_width": "16",
        }.items()
    },
    **{
        "/proc/driver/nvidia/gpus/0000:21:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1\n",
        # The board's own display
        "/sys/bus/pci/devices/0000:03:00.0/class": "0x030000",
        "/sys/bus/pci/devices/0000:03:00.0/vendor": "0x1a03",
        # No GPU, but a network card
        "/sys/bus/pci/devices/0000:41:00.0/class": "0x020000",
        "/sys/bus/pci/devices/0000:41:00.0/vendor": "0x15b3",
    },
)


def files(machine: Machine) -> dict[str, str]:
    """Path -> text, of everything that a platform reads."""
    node, cpu = "/sys/devices/system/node", "/sys/devices/system/cpu"
    ids = [facts.id if facts.id is not None else index for index, facts in enumerate(machine.nodes)]
    total = sum(facts.cores for facts in machine.nodes)
    made = {
        f"{node}/online": format_list(ids),
        f"{node}/possible": format_list(range(max(ids) + 1)),
        f"{cpu}/online": format_list(set(range(total * machine.threads_per_core)) - set(machine.offline)),
        f"{cpu}/present": format_list(range(total * machine.threads_per_core)),
        "/proc/sys/kernel/numa_balancing": "0",
        "/proc/sys/kernel/osrelease": "6.8.0",
        "/proc/sys/vm/max_map_count": "65530",
        "/proc/sys/vm/overcommit_memory": "0",
        "/proc/sys/vm/overcommit_ratio": "50",
        "/proc/sys/vm/zone_reclaim_mode": "0",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "/sys/kernel/mm/transparent_hugepage/defrag": "always defer defer+madvise [madvise] never",
        f"{cpu}/smt/control": "on" if machine.threads_per_core > 1 else "notsupported",
        "/proc/meminfo": f"MemTotal: {sum(facts.memory for facts in machine.nodes) >> 10} kB\n",
        "/proc/cpuinfo": _cpuinfo(machine),
    }
    socket_cores: dict[int, list[int]] = {}
    first = 0
    for index, facts in enumerate(machine.nodes):
        cores = range(first, first + facts.cores)
        first += facts.cores
        socket_cores.setdefault(facts.socket, []).extend(cores)
        made.update(_node_files(f"{node}/node{ids[index]}", ids[index], facts, cores, machine, index, total))
    for socket, cores in socket_cores.items():
        package = format_list(_threads(cores, total, machine))
        step = machine.cores_per_l3 or len(cores)
        for begin in range(0, len(cores), step):
            group = cores[begin : begin + step]
            shared = format_list(_threads(group, total, machine))
            for core in group:
                made.update(_core_files(cpu, core, core - cores[0], total, socket, package, shared, machine))
    return {**made, **machine.files}


def _threads(cores: Sequence[int], total: int, machine: Machine) -> list[int]:
    every = [core + total * thread for thread in range(machine.threads_per_core) for core in cores]
    return [cpu for cpu in every if cpu not in machine.offline]


def _node_files(
    folder: str, id: int, facts: NodeFacts, cores: Sequence[int], machine: Machine, index: int, total: int
) -> dict[str, str]:
    free = facts.memory if facts.free is None else facts.free
    made = {
        f"{folder}/cpulist": format_list(_threads(cores, total, machine)),
        f"{folder}/distance": " ".join(map(str, machine.distances[index])),
        f"{folder}/meminfo": f"Node {id} MemTotal: {facts.memory >> 10} kB\nNode {id} MemFree: {free >> 10} kB\n",
        f"{folder}/hugepages/hugepages-2048kB/nr_hugepages": str(facts.huge_2m),
        f"{folder}/hugepages/hugepages-2048kB/free_hugepages": str(facts.huge_2m),
    }
    if facts.claims:
        made[f"{folder}/access1/initiators/read_bandwidth"] = str(facts.claims[0])
        made[f"{folder}/access1/initiators/read_latency"] = str(facts.claims[1])
    return made


def _core_files(
    cpu: str, core: int, core_id: int, total: int, socket: int, package: str, shared: str, machine: Machine
) -> dict[str, str]:
    siblings = _threads([core], total, machine)
    made = {}
    for thread in siblings:
        folder = f"{cpu}/cpu{thread}"
        made[f"{folder}/topology/physical_package_id"] = str(socket)
        made[f"{folder}/topology/core_id"] = str(core_id)
        made[f"{folder}/topology/thread_siblings_list"] = format_list(siblings)
        made[f"{folder}/topology/core_siblings_list"] = package
        made[f"{folder}/cache/index3/level"] = "3"
        made[f"{folder}/cache/index3/shared_cpu_list"] = shared
        made[f"{folder}/cpufreq/scaling_governor"] = "performance"
    return made


def _cpuinfo(machine: Machine) -> str:
    if machine.arm:
        fields = {
            "processor": "0",
            "Features": machine.flags,
            "CPU implementer": machine.vendor,
            "CPU part": machine.model,
        }
    else:
        fields = {
            "processor": "0",
            "vendor_id": machine.vendor,
            "model name": machine.model,
            "physical id": "0",
            "core id": "0",
            "flags": machine.flags,
        }
    return "".join(f"{name}\t: {value}\n" for name, value in fields.items()) + "\n"


def tree(name: str) -> MemoryTree:
    return MemoryTree(files(MACHINES[name]), name=name)


def platform(name: str) -> Platform:
    return Platform.read(tree(name))


def write(name: str, folder: Path) -> Path:
    """The machine's files below `folder`, for `Platform.detect(fsroot=folder)`."""
    for path, text in files(MACHINES[name]).items():
        place = folder / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder


if __name__ == "__main__":
    for each in MACHINES:
        print(write(each, Path(sys.argv[1]) / each))
