"""What is known of a machine, as plain frozen data. Sizes are bytes, numbers of nodes and CPUs are the kernel's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class HugePages:
    """Reserved huge pages of one size on one node."""

    page_bytes: int
    total: int
    free: int


@dataclass(frozen=True)
class Cpu:
    """One logical CPU. Of an offline one only the number is known.

    `core` and `l3` are the lowest number among the CPUs that share the core or the L3 cache: unique over the machine,
    unlike the kernel's core_id. None: not known.
    """

    id: int
    online: bool = True
    node: int | None = None
    socket: int | None = None
    core: int | None = None
    l3: int | None = None


@dataclass(frozen=True)
class Node:
    """One NUMA node. `cpus` are its online CPUs; `socket` of a node without CPUs is that of the nearest node with some.

    `distances` go by node id as the firmware tells them (10 = local). `reclaimable_bytes` is page cache that the kernel
    drops before it runs out. Bandwidth (MB/s) and latency (ns) are the firmware's claims (HMAT), None without.
    """

    id: int
    cpus: tuple[int, ...] = ()
    socket: int | None = None
    total_bytes: int = 0
    free_bytes: int = 0
    reclaimable_bytes: int = 0
    distances: Mapping[int, int] = field(default_factory=dict)
    huge_pages: tuple[HugePages, ...] = ()
    read_mb_per_s: int | None = None
    read_latency_ns: int | None = None

    @property
    def has_memory(self) -> bool:
        return self.total_bytes > 0

    @property
    def available_bytes(self) -> int:
        """What an allocation bound to this node can get: free pages and page cache that can be dropped."""
        return min(self.total_bytes, self.free_bytes + self.reclaimable_bytes)


@dataclass(frozen=True)
class MemoryPolicy:
    """The calling thread's memory policy, inherited from numactl or a launcher; new threads and pages follow it."""

    # default | preferred | bind | interleave | local | preferred_many | weighted_interleave | unknown
    mode: str = "default"
    nodes: tuple[int, ...] = ()
    note: str = ""  # why it is unknown

    @property
    def is_default(self) -> bool:
        return self.mode in ("default", "local")


@dataclass(frozen=True)
class Cgroup:
    """What control groups allow this process: the tightest limit on the way to the root. None: no limit."""

    version: int = 0  # 0: none found
    path: str = ""
    memory_limit: int | None = None
    memory_used: int | None = None
    memory_reclaimable: int = 0
    cpu_quota: float | None = None  # in CPUs
    cpus: tuple[int, ...] | None = None
    mems: tuple[int, ...] | None = None

    @property
    def memory_available(self) -> int | None:
        if self.memory_limit is None:
            return None
        return max(0, self.memory_limit - max(0, (self.memory_used or 0) - self.memory_reclaimable))


@dataclass(frozen=True)
class Kernel:
    """Settings of the kernel that help or hurt; None or "" where they cannot be read."""

    release: str = ""
    numa_balancing: int | None = None
    transparent_hugepage: str = ""  # always | madvise | never
    transparent_defrag: str = ""
    max_map_count: int | None = None
    overcommit_memory: int | None = None
    overcommit_ratio: int | None = None
    zone_reclaim_mode: int | None = None
    governors: tuple[str, ...] = ()  # every cpufreq governor in use
    smt: str = ""  # on | off | forceoff | notsupported
    container: str = ""  # docker | podman | lxc | kubernetes ... where it shows


@dataclass(frozen=True)
class Gpu:
    """A display controller or accelerator on the PCI bus. `node` is the nearest NUMA node, None where not told."""

    address: str  # 0000:3b:00.0
    vendor: str  # nvidia | amd | intel | 0x....
    device: str
    node: int | None = None
    cpus: tuple[int, ...] = ()
    memory_bytes: int | None = None
    driver: str = ""
    link: str = ""  # "16.0 GT/s PCIe x16", as negotiated

    @property
    def name(self) -> str:
        return f"{self.vendor} {self.device}".strip()


@dataclass(frozen=True)
class MemoryModule:
    """One memory slot as the firmware describes it; `bytes` 0 where it is empty."""

    locator: str
    bank: str = ""
    bytes: int = 0
    mega_transfers: int | None = None
    kind: str = ""
