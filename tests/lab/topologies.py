"""The machines the lab can be: a table, and what each must look like from inside. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

LOCAL, NEAR, FAR = 10, 20, 30  # SLIT distances: own node, another node, a node without CPUs


@dataclass(frozen=True)
class Node:
    """`cpus` logical CPUs and `mib` of memory; `present=False` leaves a hole in the node ids."""

    cpus: int = 2
    mib: int = 768
    present: bool = True


@dataclass(frozen=True)
class Topology:
    """One machine. Node ids are positions in `nodes`; CPU numbers run through the present nodes in order.

    `sockets` must divide the nodes that have CPUs (or a hole) into equal runs of CPUs. `distances` is the whole matrix,
    holes left out; empty means LOCAL, NEAR and, to and from nodes without CPUs, FAR. `offline` CPUs are switched off
    before the command starts. On each node that has memory, `huge_2m` pages of 2 MiB are reserved then, and `huge_1g` of
    1 GiB when the kernel starts: later no such stretch is free.
    """

    name: str
    summary: str
    nodes: tuple[Node, ...]
    sockets: int = 1
    threads_per_core: int = 1
    distances: tuple[tuple[int, ...], ...] = ()
    offline: tuple[int, ...] = ()
    huge_2m: int = 0
    huge_1g: int = 0
    numa_balancing: bool = False

    @property
    def online(self) -> tuple[int, ...]:
        """Node ids the kernel has."""
        return tuple(i for i, node in enumerate(self.nodes) if node.present)

    @property
    def with_memory(self) -> tuple[int, ...]:
        return tuple(i for i in self.online if self.nodes[i].mib)

    @property
    def with_cpus(self) -> tuple[int, ...]:
        return tuple(i for i in self.online if self.cpus_of(i))

    @property
    def all_cpus(self) -> tuple[int, ...]:
        """CPU numbers, the offline ones included."""
        return tuple(range(sum(self.nodes[i].cpus for i in self.online)))

    @property
    def kernel_arguments(self) -> str:
        if not self.huge_1g:
            return ""
        return "hugepagesz=1G hugepages=" + ",".join(f"{node}:{self.huge_1g}" for node in self.with_memory)

    def cpus_of(self, node: int) -> tuple[int, ...]:
        """The online CPUs of a node."""
        first = sum(self.nodes[i].cpus for i in self.online if i < node)
        return tuple(cpu for cpu in range(first, first + self.nodes[node].cpus) if cpu not in self.offline)

    def siblings_of(self, cpu: int) -> tuple[int, ...]:
        """The online CPUs of the same physical core, `cpu` included."""
        core = cpu - cpu % self.threads_per_core
        return tuple(c for c in range(core, core + self.threads_per_core) if c not in self.offline)

    def socket_of(self, node: int) -> int | None:
        """None for a node without CPUs."""
        ranked = [i for i, n in enumerate(self.nodes) if n.cpus]
        return ranked.index(node) * self.sockets // len(ranked) if node in ranked else None

    def distance(self, a: int, b: int) -> int:
        if self.distances:
            return self.distances[self.online.index(a)][self.online.index(b)]
        if a == b:
            return LOCAL
        return NEAR if self.nodes[a].cpus and self.nodes[b].cpus else FAR


def _even(nodes: int, *, cpus: int = 2, mib: int = 768) -> tuple[Node, ...]:
    return tuple(Node(cpus=cpus, mib=mib) for _ in range(nodes))


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("1-node", "one node", _even(1, mib=1536)),
        Topology("2-nodes", "two sockets, one node each", _even(2), sockets=2, huge_2m=16),
        Topology("4-nodes", "two sockets of two nodes (NPS2, SNC2)", _even(4), sockets=2),
        Topology("8-nodes", "two sockets of four nodes (NPS4, SNC4)", _even(8, cpus=1, mib=512), sockets=2),
        Topology(
            "memory-only-node",
            "two sockets and a node without CPUs (CXL, HBM)",
            (Node(mib=1024), Node(mib=1024), Node(cpus=0, mib=512)),
            sockets=2,
        ),
        Topology(
            "memory-less-node",
            "the middle node has CPUs but an empty memory bank",
            (Node(), Node(mib=0), Node()),
            sockets=3,
        ),
        Topology(
            "sparse-ids",
            "node ids 0, 2 and 5",
            tuple(Node() if i in (0, 2, 5) else Node(cpus=2, mib=0, present=False) for i in range(6)),
            sockets=6,
        ),
        Topology("uneven-memory", "1536 and 512 MiB", (Node(mib=1536), Node(mib=512)), sockets=2),
        Topology(
            "uneven-distances",
            "every pair of nodes differs, and there differs from back",
            _even(4, cpus=1),
            sockets=4,
            distances=((10, 16, 20, 24), (23, 10, 16, 20), (27, 23, 10, 16), (31, 27, 23, 10)),
        ),
        Topology("smt", "two hardware threads a core", _even(2, cpus=4), sockets=2, threads_per_core=2),
        Topology("offline-cpus", "CPUs 1 and 6 are off", _even(2, cpus=4), sockets=2, offline=(1, 6)),
        Topology("balancing", "automatic NUMA balancing on", _even(2), sockets=2, numa_balancing=True),
        Topology(
            "large-nodes",
            "room for torch and a model, and huge pages of 1 GiB",
            _even(2, mib=3072),
            sockets=2,
            huge_2m=64,
            huge_1g=1,
        ),
    )
}


def with_nodes(count: int) -> Topology | None:
    """The plain topology of that many nodes; None if the table has none."""
    return TOPOLOGIES.get("1-node" if count == 1 else f"{count}-nodes")
