"""The runtime: nodes, their memory and their pinned threads. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numagraft import _native
from numagraft.native.pages import PageCount, page_count, query_page_sizes_of
from numagraft.runtime import RuntimeLayout


@dataclass(frozen=True)
class PlacedBuffer:
    """Page-aligned memory of one owner and the runtime nodes (indices into the layout) it is asked to lie on."""

    address: int
    bytes: int
    nodes: tuple[int, ...]
    interleaved: bool
    owner: str

    @classmethod
    def of(cls, buffer: _native.Buffer) -> PlacedBuffer:
        return cls(buffer.address, buffer.bytes, tuple(buffer.nodes), buffer.interleaved, buffer.owner)


@dataclass(frozen=True)
class WorkerPlace:
    """Where one worker of a call ran: runtime node, ranks, and the CPU and kernel node that the kernel named."""

    node: int
    rank_in_node: int
    rank: int
    cpu: int
    os_node: int


@dataclass(frozen=True)
class ArenaReport:
    """One arena: an address range whose pieces hold weights, and how its pages got to their nodes.

    `obtained`: "mbind" (the mapping carries the policy), "set_mempolicy" (mbind refused; the touching threads carried it),
    "first_touch" (both refused; threads pinned to the node touched first) or "unbound" (a virtual layout). `refused` is
    what mbind said. `page_bytes` maps page sizes to resident bytes, from smaps.
    """

    address: int
    reserved_bytes: int
    used_bytes: int
    buffers: int
    nodes: tuple[int, ...]
    os_nodes: tuple[int, ...]
    interleaved: bool
    obtained: str
    refused: str
    pages: str
    page_bytes: Mapping[int, int]


class Runtime:
    """Arenas on the layout's nodes and pools of pinned threads; every packed weight keeps its runtime alive.

    Pools are shared by all runtimes of the process that name the same CPUs, and live as long as one of them does. Raises
    ConfigurationError (a layout that makes no sense; CPUs that a live runtime uses with another thread count) and
    PlacementError (pages that this kernel does not have).

    >>> from numagraft.runtime import RuntimeLayout
    >>> runtime = Runtime(RuntimeLayout.virtual(2))
    >>> [place.node for place in runtime.observe_workers()]
    [0, 1]
    """

    def __init__(self, layout: RuntimeLayout) -> None:
        self.layout = layout
        nodes = [
            _native.NodeSpec(-1 if node.os_node is None else node.os_node, list(node.cpus), node.threads)
            for node in layout.nodes
        ]
        #: the binding's object: what packed weights are made with
        self.native = _native.Runtime(nodes, layout.bound, layout.pages)

    @property
    def threads(self) -> int:
        """Threads of a call on every node, the caller's included."""
        return sum(node.threads for node in self.layout.nodes)

    def allocate(self, bytes: int, nodes: Sequence[int], *, interleaved: bool = False, owner: str) -> _native.Buffer:
        """Zeroed, resident memory on the given runtime nodes, until `release` or the runtime's end.

        Raises PlacementError, with nothing taken, when a node, a cgroup or the huge page pool lacks the room or the system
        refuses.
        """
        return self.native.allocate(bytes, list(nodes), interleaved, owner)

    def release(self, buffer: _native.Buffer) -> None:
        """Gives the memory back to the system."""
        self.native.release(buffer)

    def verify(self, buffers: Sequence[PlacedBuffer]) -> list[PageCount]:
        """Asks the kernel for every page of these buffers, one count each; one question per huge page where smaps proves it.

        The answers are also kept natively, for the operators' remote-byte counters. Raises ValueError for an address where
        no buffer of this runtime starts.
        """
        counts, _ = self.native.verify([(buffer.address, buffer.bytes) for buffer in buffers])
        return [page_count(count) for count in counts]

    def memory_report(self) -> list[ArenaReport]:
        """Every arena, in the order of making."""
        arenas = self.native.memory_report()
        sizes = query_page_sizes_of([(arena.address, arena.reserved_bytes) for arena in arenas])
        return [_arena_report(arena, page_bytes) for arena, page_bytes in zip(arenas, sizes, strict=True)]

    def survey(self, buffers: Sequence[PlacedBuffer]) -> tuple[list[PageCount], list[ArenaReport]]:
        """`verify` and `memory_report` in one: smaps, whose reading walks all memory of the process, is read once."""
        counts, arenas, sizes = self.native.survey([(buffer.address, buffer.bytes) for buffer in buffers])
        found = [_arena_report(arena, page_bytes) for arena, page_bytes in zip(arenas, sizes, strict=True)]
        return [page_count(count) for count in counts], found

    def observe_workers(self, nodes: Sequence[int] | None = None) -> list[WorkerPlace]:
        """Runs one call on the given runtime nodes (default: all with threads) and says where each worker ran."""
        found = self.native.observe_workers(self._with_threads(nodes))
        return [WorkerPlace(w.node, w.rank_in_node, w.rank, w.cpu, w.os_node) for w in found]

    def time_calls(
        self, nodes: Sequence[int] | None = None, *, calls: int = 1000, all_barriers: int = 2, node_barriers: int = 0
    ) -> float:
        """Seconds that an empty call with that many inner barriers takes, on average."""
        return self.native.time_calls(self._with_threads(nodes), calls, all_barriers, node_barriers)

    def _with_threads(self, nodes: Sequence[int] | None) -> list[int]:
        return [i for i, node in enumerate(self.layout.nodes) if node.threads] if nodes is None else list(nodes)


def _arena_report(arena: _native.ArenaReport, page_bytes: Mapping[int, int]) -> ArenaReport:
    return ArenaReport(
        arena.address,
        arena.reserved_bytes,
        arena.used_bytes,
        arena.buffers,
        tuple(arena.nodes),
        tuple(arena.os_nodes),
        arena.interleaved,
        arena.obtained,
        arena.refused,
        arena.pages,
        page_bytes,
    )
