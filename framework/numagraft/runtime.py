"""Which nodes and threads a model runs on, decided from the platform and a rule file's `runtime:` block. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from numagraft.errors import ConfigurationError, Problem
from numagraft.platform.ids import format_list

if TYPE_CHECKING:
    from numagraft.platform import Node, Platform

Pages = Literal["auto", "4k", "thp", "2m", "1g"]


@dataclass(frozen=True)
class RuntimeSettings:
    """The `runtime:` block of a rule file. `nodes` are kernel node ids."""

    nodes: Literal["all"] | tuple[int, ...] = "all"
    threads_per_node: Literal["auto"] | int = "auto"
    pages: Pages = "auto"
    strict: bool = True


@dataclass(frozen=True)
class RuntimeNode:
    """One node of a runtime: its kernel id (None when virtual), the CPUs to pin to, and how many threads run on them.

    `cpus` has one CPU of each physical core first, then their SMT siblings; threads are pinned to the first `threads`.
    A memory-only node, or one for which a CPU quota leaves no thread, has no CPUs and no threads. `free_bytes` is what an
    allocation can get: free pages and page cache that can be dropped, within the control group's limit.
    """

    os_node: int | None
    cpus: tuple[int, ...]
    threads: int
    socket: int = 0
    free_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class RuntimeLayout:
    """Nodes by index (placements refer to these indices); `bound` is False for a virtual layout: nothing is pinned.

    `distances[i][j]` is the firmware's distance from node i to node j (10: local), () where not known.
    """

    nodes: tuple[RuntimeNode, ...]
    bound: bool = True
    pages: Pages = "auto"
    strict: bool = True
    distances: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def virtual(cls, nodes: int, *, threads_per_node: int = 1, sockets: int | None = None) -> RuntimeLayout:
        """`nodes` unbound nodes on whatever machine this is, to test placements without having them."""
        per_socket = -(-nodes // (sockets or nodes))
        return cls(
            nodes=tuple(RuntimeNode(None, (), threads_per_node, socket=i // per_socket) for i in range(nodes)),
            bound=False,
        )

    @classmethod
    def from_platform(cls, platform: Platform, settings: RuntimeSettings | None = None) -> RuntimeLayout:
        """Physical cores first, one thread each, only allowed CPUs and memory; memory-only nodes only when listed.

        A replayed platform gives an unbound layout. Raises ConfigurationError with every node that cannot be used.
        """
        settings = settings or RuntimeSettings()
        notes: list[str] = []
        chosen = _all_nodes(platform, notes) if settings.nodes == "all" else _listed_nodes(platform, settings.nodes)
        cores = {node.id: platform.cores(node.id) for node in chosen}
        if not any(cores.values()):
            cores[chosen[0].id] = platform.cores()
            notes.append(
                f"CPUs {format_list(platform.allowed_cpus)} compute on memory of node {chosen[0].id}: "
                "no allowed node has both CPUs and memory"
            )
        threads = _thread_counts(platform, settings, cores, notes)
        available = platform.available_bytes()
        return cls(
            nodes=tuple(
                RuntimeNode(
                    os_node=node.id,
                    cpus=_pin_order(platform, cores[node.id], threads[node.id]) if threads[node.id] else (),
                    threads=threads[node.id],
                    socket=node.socket or 0,
                    free_bytes=available.get(node.id, 0),
                    total_bytes=node.total_bytes,
                )
                for node in chosen
            ),
            bound=platform.live,
            pages=settings.pages,
            strict=settings.strict,
            distances=_distances(chosen),
            notes=tuple(notes),
        )

    @property
    def compute_nodes(self) -> tuple[int, ...]:
        """Indices of the nodes that have threads."""
        return tuple(index for index, node in enumerate(self.nodes) if node.threads > 0)

    def index_of(self, os_node: int) -> int | None:
        """The index of a kernel node id; in a virtual layout ids are indices. None: not part of this layout."""
        for index, node in enumerate(self.nodes):
            if (index if node.os_node is None else node.os_node) == os_node:
                return index
        return None

    def nearest_compute_nodes(self, node: int) -> tuple[int, ...]:
        """The node itself where it has threads, else the compute nodes at the least distance, else all of them."""
        compute = self.compute_nodes
        if node in compute or not compute:
            return (node,) if node in compute else ()
        if self.distances:
            least = min(self.distances[node][other] for other in compute)
            return tuple(other for other in compute if self.distances[node][other] == least)
        beside = tuple(other for other in compute if self.nodes[other].socket == self.nodes[node].socket)
        return beside or compute


def _all_nodes(platform: Platform, notes: list[str]) -> list[Node]:
    usable = platform.usable_nodes
    if not usable:
        # Memory and CPUs were allowed on different nodes: take the memory that is nearest to the CPUs.
        return [_nearest_memory(platform)]
    idle = [
        node
        for node in platform.nodes
        if node.id not in usable and any(cpu in platform.allowed_cpus for cpu in node.cpus)
    ]
    for node in idle:
        why = "has no memory" if not node.has_memory else "is not in Mems_allowed"
        notes.append(f"node {node.id} {why}: its CPUs stay idle")
    apart = platform.memory_only_nodes
    if apart:
        notes.append(f"memory-only nodes {format_list(apart)} are used only when runtime.nodes lists them")
    return [platform.node(id) for id in usable]


def _listed_nodes(platform: Platform, ids: Sequence[int]) -> list[Node]:
    where = "runtime.nodes"
    problems = []
    by_id = {node.id: node for node in platform.nodes}
    usable, memory_only = platform.usable_nodes, platform.memory_only_nodes
    hint = f"usable nodes: {format_list(usable) or 'none'}"
    if memory_only:
        hint += f"; memory-only nodes: {format_list(memory_only)}"
    if not ids:
        problems.append(Problem(where, "the list is empty", f'list at least one node, or give "all"; {hint}'))
    for id in sorted(set(ids)):
        node = by_id.get(id)
        if ids.count(id) > 1:
            problems.append(Problem(where, f"node {id} is listed {ids.count(id)} times"))
        if node is None:
            problems.append(Problem(where, f"node {id} does not exist", hint))
        elif not node.has_memory and any(other.has_memory for other in platform.nodes):
            problems.append(Problem(where, f"node {id} has no memory", hint))
        elif id not in platform.allowed_nodes:
            problems.append(
                Problem(
                    where,
                    f"node {id} is not allowed to this process (Mems_allowed: {format_list(platform.allowed_nodes)})",
                    f"a cpuset, a container or numactl restricts it; {hint}",
                )
            )
        elif id not in usable and id not in memory_only:
            problems.append(
                Problem(
                    where,
                    f"none of node {id}'s CPUs ({format_list(node.cpus)}) is allowed to this process "
                    f"({format_list(platform.allowed_cpus)})",
                    f"taskset, a cpuset, a container or Slurm restricts it; {hint}",
                )
            )
    if not problems and not any(id in usable for id in ids) and usable:
        problems.append(
            Problem(where, f"nodes {format_list(ids)} have no CPUs", f"list a node that computes too; {hint}")
        )
    if problems:
        raise ConfigurationError("these nodes cannot be used", problems)
    return [by_id[id] for id in sorted(ids)]


def _nearest_memory(platform: Platform) -> Node:
    near = next((node for node in platform.nodes if any(cpu in platform.allowed_cpus for cpu in node.cpus)), None)
    distances = near.distances if near is not None else {}
    return platform.node(min(platform.allowed_nodes, key=lambda id: (distances.get(id, 255), id)))


def _thread_counts(
    platform: Platform, settings: RuntimeSettings, cores: dict[int, tuple[tuple[int, ...], ...]], notes: list[str]
) -> dict[int, int]:
    asked = settings.threads_per_node
    if asked != "auto":
        where = "runtime.threads_per_node"
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise ConfigurationError(
                "wrong thread count", [Problem(where, f"{asked!r} is not a positive number", 'give a number or "auto"')]
            )
        problems = [
            Problem(
                where,
                f"{asked} threads asked for, but node {node} has {sum(map(len, own))} CPUs that this process may use "
                f"({len(own)} cores)",
                f'at most {sum(map(len, own))}; "auto" takes one per core',
            )
            for node, own in cores.items()
            if own and asked > sum(map(len, own))
        ]
        if problems:
            raise ConfigurationError("more threads than CPUs", problems)
        counts = {node: asked if own else 0 for node, own in cores.items()}
        quota = platform.cgroup.cpu_quota
        if quota is not None and quota < sum(counts.values()):
            notes.append(
                f"the control group pays for {quota:g} CPUs: the {sum(counts.values())} threads asked for will be stopped "
                "together for part of every period"
            )
        return counts
    counts = {node: len(own) for node, own in cores.items()}
    quota = platform.cgroup.cpu_quota
    total = sum(counts.values())
    if quota is not None and quota < total:
        # More running threads than the quota pays for are stopped together for the rest of every period.
        room = max(int(quota), 1)
        while sum(counts.values()) > room:
            largest = max(counts, key=lambda node: (counts[node], node))
            counts[largest] -= 1
        notes.append(f"the control group pays for {quota:g} CPUs: {sum(counts.values())} threads instead of {total}")
        idle = [node for node, own in cores.items() if own and not counts[node]]
        if idle:
            notes.append(f"that leaves no thread for nodes {format_list(idle)}: their memory is used only where listed")
    return counts


def _pin_order(platform: Platform, cores: tuple[tuple[int, ...], ...], threads: int) -> tuple[int, ...]:
    """One CPU per core, then the siblings. With fewer threads than cores they go round the L3 groups: on chiplet
    machines each group has its own link to memory."""
    ordered = list(cores)
    if 0 < threads < len(cores):
        l3_of = {cpu.id: cpu.l3 for cpu in platform.cpus}
        seen: dict[int | None, int] = {}
        turns = []
        for core in cores:
            group = l3_of.get(core[0])
            turns.append(seen.get(group, 0))
            seen[group] = turns[-1] + 1
        ordered = [core for _, core in sorted(zip(turns, cores, strict=True))]
    return tuple(core[turn] for turn in range(max(map(len, cores), default=0)) for core in ordered if turn < len(core))


def _distances(nodes: Sequence[Node]) -> tuple[tuple[int, ...], ...]:
    ids = [node.id for node in nodes]
    if not all(set(ids) <= set(node.distances) for node in nodes):
        return ()
    return tuple(tuple(node.distances[id] for id in ids) for node in nodes)
