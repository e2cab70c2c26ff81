"""Which nodes and threads a model runs on, decided from the platform and a rule file's `runtime:` block. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """One node of a runtime: its kernel id (None when virtual), the CPUs to pin to, and how many threads run on them."""

    os_node: int | None
    cpus: tuple[int, ...]
    threads: int
    socket: int = 0
    free_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class RuntimeLayout:
    """Nodes by index (placements refer to these indices); `bound` is False for a virtual layout: nothing is pinned."""

    nodes: tuple[RuntimeNode, ...]
    bound: bool = True
    pages: Pages = "auto"
    strict: bool = True

    @classmethod
    def virtual(cls, nodes: int, *, threads_per_node: int = 1, sockets: int | None = None) -> RuntimeLayout:
        """`nodes` unbound nodes on whatever machine this is, to test placements without having them."""
        per_socket = -(-nodes // (sockets or nodes))
        return cls(
            nodes=tuple(RuntimeNode(None, (), threads_per_node, socket=i // per_socket) for i in range(nodes)),
            bound=False,
        )

    # from_platform(platform, settings) -> RuntimeLayout      (to be written with the platform)
