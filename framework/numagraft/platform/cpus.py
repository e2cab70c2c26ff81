"""CPUs from /sys/devices/system/cpu: which are online, and what they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from numagraft.platform.facts import Cpu
from numagraft.platform.ids import MAX_ID, parse_int, parse_list, parse_mask
from numagraft.platform.tree import LONG_READ_LIMIT, Tree

_SYS = "/sys/devices/system/cpu"
_CPU = re.compile(r"cpu(\d{1,6})$")
_NODE = re.compile(r"node(\d{1,6})$")


def read_cpus(tree: Tree, node_cpus: Mapping[int, tuple[int, ...]]) -> tuple[Cpu, ...]:
    """Every CPU that is present, by number; `node_cpus` says which node each belongs to.

    Where sysfs says nothing, /proc/cpuinfo does; where that is missing too, the nodes' CPUs are all there are.
    """
    online, present = _online_and_present(tree, node_cpus)
    home = {cpu: node for node, cpus in node_cpus.items() for cpu in cpus}
    known = {name for name in tree.entries(_SYS) if _CPU.match(name)}
    core_of: dict[int, int] = {}
    l3_of: dict[int, int] = {}
    socket_of: dict[int, int] = {}
    listed = set(online)
    fallback = None
    for cpu in sorted(listed):
        folder = f"{_SYS}/cpu{cpu}"
        if cpu not in core_of:
            siblings = _shared(tree, f"{folder}/topology", ("core_cpus", "thread_siblings"), cpu)
            if siblings is None:
                if fallback is None:
                    fallback = _cpuinfo_topology(tree)
                siblings = fallback.get(cpu, ((cpu,), None))[0]
            first = min(sibling for sibling in siblings if sibling in listed) if cpu in siblings else cpu
            for sibling in siblings:
                core_of.setdefault(sibling, first)
        if cpu not in socket_of:
            package = parse_int(tree.read(f"{folder}/topology/physical_package_id"))
            if package is None:
                if fallback is None:
                    fallback = _cpuinfo_topology(tree)
                package = fallback.get(cpu, ((cpu,), None))[1]
                members: tuple[int, ...] | None = None
            else:
                # -1 on boards whose firmware has no packages: everything is one.
                package = max(package, 0)
                members = _shared(tree, f"{folder}/topology", ("package_cpus", "core_siblings"), cpu)
            if package is not None:
                for member in members or (cpu,):
                    socket_of.setdefault(member, package)
        if cpu not in l3_of:
            group = _l3_group(tree, folder, cpu)
            if group is not None:
                group = tuple(member for member in group if member in listed)
                for member in group:
                    l3_of.setdefault(member, group[0])
        if cpu not in home and f"cpu{cpu}" in known:
            for name in tree.entries(folder):
                if match := _NODE.match(name):
                    home[cpu] = int(match[1])
    return tuple(
        Cpu(
            id=cpu,
            online=cpu in listed,
            node=home.get(cpu) if cpu in listed else None,
            socket=socket_of.get(cpu) if cpu in listed else None,
            core=core_of.get(cpu, cpu) if cpu in listed else None,
            l3=l3_of.get(cpu) if cpu in listed else None,
        )
        for cpu in sorted(listed | set(present))
    )


def read_l3_bytes(tree: Tree, cpus: Sequence[Cpu]) -> int | None:
    """Size of the first online CPU's L3 cache ("32768K")."""
    first = next((cpu.id for cpu in cpus if cpu.online), None)
    for name in tree.entries(f"{_SYS}/cpu{first}/cache"):
        folder = f"{_SYS}/cpu{first}/cache/{name}"
        if tree.read(f"{folder}/level") == "3":
            match = re.fullmatch(r"([0-9]{1,9})K", tree.read(f"{folder}/size") or "")
            return int(match[1]) << 10 if match else None
    return None


def _online_and_present(
    tree: Tree, node_cpus: Mapping[int, tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    folders = sorted(int(match[1]) for name in tree.entries(_SYS) if (match := _CPU.match(name)))
    folders = [cpu for cpu in folders if cpu < MAX_ID]
    present = parse_list(tree.read(f"{_SYS}/present")) or tuple(folders)
    online = parse_list(tree.read(f"{_SYS}/online"))
    if not online and folders:
        # Kernels before 2.6.26 list nothing; cpu0 often has no `online` file because it cannot be taken offline.
        online = tuple(cpu for cpu in folders if tree.read(f"{_SYS}/cpu{cpu}/online") != "0")
    if not online:
        online = tuple(sorted(_cpuinfo_topology(tree)))
    if not online:
        online = tuple(sorted({cpu for cpus in node_cpus.values() for cpu in cpus}))
    return online, present


def _shared(tree: Tree, folder: str, names: tuple[str, ...], cpu: int) -> tuple[int, ...] | None:
    """The CPUs of the first file that is there and holds `cpu`: a list (`name_list`) or, on old kernels, a mask."""
    for name in names:
        for parse, file in ((parse_list, f"{name}_list"), (parse_mask, name)):
            members = parse(tree.read(f"{folder}/{file}"))
            if members and cpu in members:
                return members
    return None


def _l3_group(tree: Tree, folder: str, cpu: int) -> tuple[int, ...] | None:
    # index3 is the unified L3 on every x86 machine; others number their caches freely.
    names = ("index3", *(n for n in tree.entries(f"{folder}/cache") if n != "index3" and n.startswith("index")))
    for name in names:
        if tree.read(f"{folder}/cache/{name}/level") == "3":
            for parse, file in ((parse_list, "shared_cpu_list"), (parse_mask, "shared_cpu_map")):
                members = parse(tree.read(f"{folder}/cache/{name}/{file}"))
                if members and cpu in members:
                    return members
            return None
    return None


def _cpuinfo_topology(tree: Tree) -> dict[int, tuple[tuple[int, ...], int | None]]:
    """CPU -> (siblings, socket) from /proc/cpuinfo, which lists online CPUs only."""
    cores: dict[tuple[int, int], list[int]] = {}
    places: dict[int, tuple[int, int] | None] = {}
    for block in (tree.read("/proc/cpuinfo", LONG_READ_LIMIT) or "").split("\n\n"):
        fields = {}
        for line in block.splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value)
        cpu = parse_int(fields.get("processor"))
        if cpu is None or not 0 <= cpu < MAX_ID:
            continue
        package, core = parse_int(fields.get("physical id")), parse_int(fields.get("core id"))
        places[cpu] = None if package is None or core is None else (package, core)
        if package is not None and core is not None:
            cores.setdefault((package, core), []).append(cpu)
    return {
        cpu: ((cpu,), None) if place is None else (tuple(sorted(cores[place])), place[0])
        for cpu, place in places.items()
    }
