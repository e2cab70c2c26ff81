"""NUMA nodes from /sys/devices/system/node."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from numagraft.platform.facts import Cpu, HugePages, Node
from numagraft.platform.ids import MAX_ID, parse_int, parse_list, parse_mask
from numagraft.platform.tree import Tree

_SYS = "/sys/devices/system/node"
_NODE = re.compile(r"node(\d{1,6})$")
_HUGE = re.compile(r"hugepages-(\d{1,9})kB$")


def read_node_cpus(tree: Tree) -> dict[int, tuple[int, ...]]:
    """Online node ids, which may be sparse, and the CPUs that each lists; empty for a kernel without NUMA support."""
    folders = sorted(int(match[1]) for name in tree.entries(_SYS) if (match := _NODE.match(name)))
    online = parse_list(tree.read(f"{_SYS}/online"))
    ids = [node for node in folders if node < MAX_ID and (online is None or node in online)]
    result = {}
    for node in ids:
        cpus = parse_list(tree.read(f"{_SYS}/node{node}/cpulist"))
        if cpus is None:
            cpus = parse_mask(tree.read(f"{_SYS}/node{node}/cpumap"))
        result[node] = cpus or ()
    return result


def read_nodes(tree: Tree, node_cpus: Mapping[int, tuple[int, ...]], cpus: Sequence[Cpu]) -> tuple[Node, ...]:
    """The nodes with memory, distances and huge pages. Without NUMA support: one node 0 with every online CPU."""
    machine = read_meminfo(tree.read("/proc/meminfo"))
    by_id = {cpu.id: cpu for cpu in cpus}
    if not node_cpus:
        online = tuple(cpu.id for cpu in cpus if cpu.online)
        return (_with_memory(Node(0, online, _main_socket(online, by_id), distances={0: 10}), machine),)
    possible = parse_list(tree.read(f"{_SYS}/possible")) or ()
    ids = tuple(node_cpus)
    nodes = []
    for node in ids:
        folder = f"{_SYS}/node{node}"
        online = tuple(cpu for cpu in node_cpus[node] if cpu in by_id and by_id[cpu].online)
        bandwidth, latency = _claims(tree, folder)
        nodes.append(
            _with_memory(
                Node(
                    node,
                    online,
                    _main_socket(online, by_id),
                    distances=_distances(tree.read(f"{folder}/distance"), node, ids, possible),
                    huge_pages=_huge_pages(tree, f"{folder}/hugepages"),
                    read_mb_per_s=bandwidth,
                    read_latency_ns=latency,
                ),
                read_meminfo(tree.read(f"{folder}/meminfo")),
            )
        )
    if len(nodes) == 1 and len(possible) <= 1:
        nodes = _one_memory(nodes, machine)
    return tuple(_with_nearest_socket(node, nodes) for node in nodes)


def read_meminfo(text: str | None) -> dict[str, int]:
    """Field -> bytes, of /proc/meminfo or a node's meminfo ("Node 0 MemTotal:   5466316 kB")."""
    fields = {}
    for line in (text or "").splitlines():
        key, _, value = line.partition(":")
        name = key.split()[-1] if key.split() else ""
        number, _, unit = value.strip().partition(" ")
        amount = parse_int(number)
        if amount is not None and 0 <= amount < 1 << 52:
            fields.setdefault(name, amount * 1024 if unit.strip().lower() == "kb" else amount)
    return fields


def _with_memory(node: Node, fields: Mapping[str, int]) -> Node:
    total = fields.get("MemTotal", 0)
    # Dirty and mapped file pages cannot go at once: count the file LRU without them, and half of the slab.
    cache = fields.get("Active(file)", 0) + fields.get("Inactive(file)", 0)
    cache -= fields.get("Dirty", 0) + fields.get("Writeback", 0) + fields.get("Mapped", 0)
    return replace(
        node,
        total_bytes=total,
        free_bytes=min(total, fields.get("MemFree", 0)),
        reclaimable_bytes=max(0, cache) + fields.get("SReclaimable", 0) // 2,
    )


def _one_memory(nodes: list[Node], machine: Mapping[str, int]) -> list[Node]:
    """Where no second node is possible, /proc/meminfo tells of the same memory, and of parts that the node's zones
    miss: a virtual machine whose memory is handed over late shows 24 GB there and 5 GB on its node."""
    return [_with_memory(node, machine) if machine.get("MemTotal", 0) > node.total_bytes else node for node in nodes]


def _distances(text: str | None, node: int, ids: Sequence[int], possible: Sequence[int]) -> dict[int, int]:
    """A row of the distance table: one number per online node, in the order of their ids; {} where it does not fit."""
    numbers = [parse_int(word) for word in (text or "").split()]
    if any(number is None or not 0 < number < 256 for number in numbers):
        return {}
    for columns in (ids, possible):
        if len(numbers) == len(columns) and node in columns:
            row = {column: number for column, number in zip(columns, numbers, strict=True) if number is not None}
            return {column: number for column, number in row.items() if column in ids}
    return {}


def _huge_pages(tree: Tree, folder: str) -> tuple[HugePages, ...]:
    found = []
    for name in tree.entries(folder):
        if match := _HUGE.match(name):
            total = parse_int(tree.read(f"{folder}/{name}/nr_hugepages"))
            free = parse_int(tree.read(f"{folder}/{name}/free_hugepages"))
            if total is not None and free is not None and total >= 0 and free >= 0:
                found.append(HugePages(int(match[1]) << 10, total, free))
    return tuple(sorted(found, key=lambda pages: pages.page_bytes))


def _claims(tree: Tree, folder: str) -> tuple[int | None, int | None]:
    """What the firmware says of reads by the nearest initiator (access1: the nearest CPU; access0: any initiator)."""
    for access in ("access1", "access0"):
        bandwidth = parse_int(tree.read(f"{folder}/{access}/initiators/read_bandwidth"))
        latency = parse_int(tree.read(f"{folder}/{access}/initiators/read_latency"))
        if bandwidth or latency:
            return bandwidth or None, latency or None
    return None, None


def _main_socket(cpus: Sequence[int], by_id: Mapping[int, Cpu]) -> int | None:
    """The socket of most of a node's CPUs; the lowest in a draw (a node may span sockets: NPS0)."""
    sockets = [socket for cpu in cpus if (socket := by_id[cpu].socket) is not None]
    return min(set(sockets), key=lambda socket: (-sockets.count(socket), socket)) if sockets else None


def _with_nearest_socket(node: Node, nodes: Sequence[Node]) -> Node:
    if node.socket is not None:
        return node
    near = [other for other in nodes if other.socket is not None and other.id in node.distances]
    if not near:
        return node
    return replace(node, socket=min(near, key=lambda other: (node.distances[other.id], other.id)).socket)
