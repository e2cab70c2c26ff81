"""Free memory, huge pages, modules, and the kernel's ways with memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from numagraft.doctor.circumstances import Circumstances
from numagraft.doctor.finding import Finding
from numagraft.platform import MemoryModule, Platform
from numagraft.sizes import format_size

_GIB = 1 << 30
#: The kernel's own default; numagraft itself needs a few hundred mappings, a Python process with torch some thousands.
_USUAL_MAP_COUNT = 65530
_TOO_FEW_MAPS = 16384


def judge_memory(circumstances: Circumstances) -> Iterator[Finding]:
    platform = circumstances.platform
    yield from _free_memory(platform)
    yield from _sizes(platform)
    yield from _pages(platform)
    yield from _kernel(platform)
    yield from _modules(platform.memory_modules)


def _free_memory(platform: Platform) -> Iterator[Finding]:
    nodes = [node for node in platform.nodes if node.id in platform.allowed_nodes and node.has_memory]
    full = [node for node in nodes if node.available_bytes < node.total_bytes // 10]
    for node in full:
        yield Finding(
            "advice",
            "free-memory",
            f"node {node.id} has {format_size(node.available_bytes)} of {format_size(node.total_bytes)} available",
            "numastat -m and `numastat -p PID` show who has it",
        )
    if len(nodes) > 1 and not full:
        # Shares, since nodes of different sizes are another finding.
        least = min(nodes, key=lambda node: node.available_bytes / node.total_bytes)
        most = max(nodes, key=lambda node: node.available_bytes / node.total_bytes)
        if most.available_bytes / most.total_bytes > 2 * least.available_bytes / least.total_bytes:
            yield Finding(
                "advice",
                "free-imbalance",
                f"of node {most.id} {most.available_bytes / most.total_bytes:.0%} are available, of node {least.id} "
                f"{least.available_bytes / least.total_bytes:.0%}: the fullest node decides what fits",
                "numastat -m shows what fills it; echo 1 > /proc/sys/vm/drop_caches (as root) drops page cache",
            )


def _sizes(platform: Platform) -> Iterator[Finding]:
    nodes = [node for node in platform.nodes if node.cpus and node.has_memory]
    if len(nodes) > 1:
        least, most = min(nodes, key=lambda n: n.total_bytes), max(nodes, key=lambda n: n.total_bytes)
        # Firmware and kernel take some of node 0.
        if most.total_bytes > 1.2 * least.total_bytes + _GIB:
            yield Finding(
                "advice",
                "uneven-memory",
                f"node {most.id} has {format_size(most.total_bytes)}, node {least.id} {format_size(least.total_bytes)}: "
                "memory channels are filled differently, so the nodes are not equally fast",
                "fit the same modules to every channel of every socket",
            )


def _pages(platform: Platform) -> Iterator[Finding]:
    if platform.kernel.transparent_hugepage == "never":
        yield Finding(
            "advice",
            "thp",
            "transparent huge pages are off: weights lie on 4 KiB pages, and address translation costs several percent",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    reserved = {
        size: {
            node.id: pages.total
            for node in platform.nodes
            if node.id in platform.usable_nodes
            for pages in node.huge_pages
            if pages.page_bytes == size
        }
        for size in sorted({pages.page_bytes for node in platform.nodes for pages in node.huge_pages})
    }
    for size, by_node in reserved.items():
        total = sum(by_node.values())
        if not total:
            continue
        free = sum(pages.free for node in platform.nodes for pages in node.huge_pages if pages.page_bytes == size)
        yield Finding(
            "note",
            "huge-pages",
            f"{total} huge pages of {format_size(size)} are reserved ({free} free): "
            + ", ".join(f"node {node}: {count}" for node, count in by_node.items()),
            f"runtime: {{pages: {'2m' if size == 2 << 20 else '1g'}}} uses them" if size in (2 << 20, _GIB) else "",
        )
        if len(by_node) > 1 and max(by_node.values()) > min(by_node.values()):
            yield Finding(
                "advice",
                "huge-pages-uneven",
                f"huge pages of {format_size(size)} are reserved unevenly: the node with the fewest decides what fits",
                "write the same number to /sys/devices/system/node/nodeN/hugepages/"
                f"hugepages-{size >> 10}kB/nr_hugepages of every node",
            )


def _kernel(platform: Platform) -> Iterator[Finding]:
    kernel = platform.kernel
    several = sum(node.has_memory for node in platform.nodes) > 1
    if several and kernel.numa_balancing:
        yield Finding(
            "hurts",
            "numa-balancing",
            "automatic NUMA balancing is on: the kernel unmaps pages to sample accesses and moves them between nodes",
            "sysctl -w kernel.numa_balancing=0",
        )
    if several and kernel.zone_reclaim_mode:
        yield Finding(
            "hurts",
            "zone-reclaim",
            f"vm.zone_reclaim_mode is {kernel.zone_reclaim_mode}: a full node throws page cache out before it asks the next",
            "sysctl -w vm.zone_reclaim_mode=0",
        )
    if kernel.max_map_count is not None and kernel.max_map_count < _USUAL_MAP_COUNT:
        few = kernel.max_map_count < _TOO_FEW_MAPS
        yield Finding(
            "hurts" if few else "advice",
            "max-map-count",
            f"vm.max_map_count is {kernel.max_map_count}, below the usual {_USUAL_MAP_COUNT}",
            f"sysctl -w vm.max_map_count={_USUAL_MAP_COUNT}",
        )
    if kernel.overcommit_memory == 2:
        yield Finding(
            "advice",
            "overcommit",
            f"vm.overcommit_memory is 2 (ratio {kernel.overcommit_ratio}): reserved address space counts as used memory",
            "sysctl -w vm.overcommit_memory=0, or raise vm.overcommit_ratio",
        )


def _modules(modules: tuple[MemoryModule, ...]) -> Iterator[Finding]:
    filled = [module for module in modules if module.bytes]
    if not filled:
        return
    empty = len(modules) - len(filled)
    sizes = Counter(module.bytes for module in filled)
    speeds = sorted({module.mega_transfers for module in filled if module.mega_transfers})
    kind = next((module.kind for module in filled if module.kind), "memory")
    text = ", ".join(f"{count} x {format_size(size)}" for size, count in sorted(sizes.items()))
    yield Finding("note", "memory-modules", f"{kind} modules: {text}" + (f" at {speeds[-1]} MT/s" if speeds else ""))
    if empty:
        yield Finding(
            "advice",
            "empty-slots",
            f"{empty} of {len(modules)} memory slots are empty: {_some(m.locator for m in modules if not m.bytes)}",
            "bandwidth goes with filled channels: see in the board's manual that every channel has one",
        )
    if len(sizes) > 1:
        yield Finding(
            "advice", "mixed-modules", f"memory modules differ in size ({text})", "fit the same module to every channel"
        )
    if len(speeds) > 1:
        yield Finding(
            "advice",
            "mixed-speeds",
            f"memory modules differ in speed ({', '.join(map(str, speeds))} MT/s): all run at the slowest",
            "fit modules of one speed",
        )


def _some(names: object, most: int = 6) -> str:
    listed = [str(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
