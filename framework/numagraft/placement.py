"""Placement: what a rule may ask (`PlacementSpec`), and what was decided for one module (`Placement`). Imports no torch.

Node numbers here index `RuntimeLayout.nodes`; the kernel's ids live in `RuntimeLayout.nodes[i].os_node`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["auto", "shard", "mirror", "interleave", "bind"]


@dataclass(frozen=True)
class PlacementSpec:
    """A rule's `placement` kwarg: the short form is the policy's name, the long form a mapping with these keys.

    `nodes` are kernel node ids (None: every usable node); `budget` is bytes per node and rule (mirror only): whole modules
    in model order are mirrored until it is spent, the rest sharded.
    """

    policy: Policy = "auto"
    nodes: tuple[int, ...] | None = None
    per: Literal["node", "socket"] = "node"
    budget: int | None = None


@dataclass(frozen=True)
class Part:
    """Units [begin, end) of a weight, the runtime nodes that hold them and the runtime nodes that compute them."""

    memory_nodes: tuple[int, ...]
    interleaved: bool
    worker_nodes: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Placement:
    """The decision for one module: a concrete policy (never `auto`), its parts, and why."""

    policy: Policy
    parts: tuple[Part, ...]
    reason: str = ""
