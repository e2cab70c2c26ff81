"""Nodes, sockets, cores and instruction sets."""

from __future__ import annotations

from collections.abc import Iterator

from numagraft.doctor.circumstances import Circumstances
from numagraft.doctor.finding import Finding
from numagraft.platform import Platform
from numagraft.platform.ids import format_list


def judge_topology(circumstances: Circumstances) -> Iterator[Finding]:
    platform = circumstances.platform
    yield from _nodes_and_sockets(platform)
    yield from _odd_nodes(platform)
    yield from _cores(platform)
    yield from _instructions(circumstances)
    for note in platform.notes:
        yield Finding("note", "platform", note)


def _nodes_and_sockets(platform: Platform) -> Iterator[Finding]:
    sockets, per_socket = len(platform.sockets), platform.nodes_per_socket
    with_cpus = [node for node in platform.nodes if node.cpus]
    if sockets > 1 and len(with_cpus) < sockets:
        yield Finding(
            "hurts",
            "hidden-nodes",
            f"{sockets} sockets but {len(with_cpus)} NUMA node{'s' if len(with_cpus) > 1 else ''}: the firmware interleaves "
            "memory over the sockets, so about half of all reads are remote and nothing can be placed",
            "in the firmware set up: Intel: node interleaving off; AMD: NPS1 or more; and boot without numa=off",
        )
    if per_socket > 1:
        kind = (
            f"NPS{per_socket}" if platform.cpu.vendor in ("AMD", "Hygon") else f"sub-NUMA clustering (SNC{per_socket})"
        )
        yield Finding(
            "note",
            "nodes-per-socket",
            f"{kind}: {len(with_cpus)} nodes on {sockets} socket{'s' if sockets > 1 else ''}; a mirror per node holds "
            f"{len(with_cpus)} copies of a weight, per socket {sockets}",
            "placement: {policy: mirror, per: socket}, or shard, which holds one copy in all",
        )
    if len(platform.usable_nodes) == 1 and len(with_cpus) == 1:
        yield Finding("note", "one-node", "one NUMA node: every placement is the same here, and memory is always local")


def _odd_nodes(platform: Platform) -> Iterator[Finding]:
    empty = [node.id for node in platform.nodes if node.cpus and not node.has_memory]
    if empty and any(node.has_memory for node in platform.nodes):
        yield Finding(
            "advice",
            "memory-less-nodes",
            f"nodes without memory: {format_list(empty)}; their CPUs stay idle, since all they read would be remote",
            "fit memory to their channels",
        )
    far = [node for node in platform.nodes if not node.cpus and node.has_memory]
    for node in far:
        told = f", firmware says {node.read_mb_per_s / 1000:.0f} GB/s" if node.read_mb_per_s else ""
        yield Finding(
            "note",
            "memory-only-nodes",
            f"node {node.id} has memory but no CPUs (CXL, or HBM in flat mode{told}): used only where it is listed",
            f"to use it: runtime.nodes and placement.nodes with {node.id} in them",
        )


def _cores(platform: Platform) -> Iterator[Finding]:
    offline = [cpu.id for cpu in platform.cpus if not cpu.online]
    present = len(platform.cpus) - len(offline)
    if offline and len(offline) <= present:
        yield Finding(
            "advice",
            "offline-cpus",
            f"{len(offline)} CPUs are offline ({format_list(offline)})",
            "echo 1 > /sys/devices/system/cpu/cpuN/online, unless they are SMT siblings switched off on purpose",
        )
    threads = max((len(core) for core in platform.cores(allowed=False)), default=1)
    if threads > 1:
        yield Finding(
            "note",
            "smt",
            f"{threads} hardware threads per core: numagraft runs one thread on each core and leaves the siblings idle",
        )
    slow = [name for name in platform.kernel.governors if name not in ("performance", "schedutil")]
    if slow:
        yield Finding(
            "advice",
            "governor",
            f"CPU frequency governor: {', '.join(slow)}; short calls run before the clock is up",
            "cpupower frequency-set -g performance",
        )


def _instructions(circumstances: Circumstances) -> Iterator[Finding]:
    platform, backend = circumstances.platform, circumstances.backend
    cpu = platform.cpu
    if cpu.blocked:
        yield Finding(
            "hurts",
            "isa-blocked",
            f"the CPU has {', '.join(cpu.blocked)}, but this process may not use it",
            "a kernel before 5.16, or a filter that forbids arch_prctl: update it, or allow the call",
        )
    elif cpu.arch == "x86_64" and cpu.features and platform.isa == ("scalar",):
        yield Finding(
            "hurts",
            "isa",
            f"{cpu.model or 'this CPU'} shows no AVX2: only the scalar kernels run, many times slower",
            "in a virtual machine pass the host's CPU through (-cpu host)",
        )
    if backend is None:
        return
    if backend.error:
        yield Finding(
            "hurts",
            "backend",
            f"the native backend does not work: {backend.error}",
            "unset NUMAGRAFT_ISA, or set it to a supported one"
            if "NUMAGRAFT_ISA" in backend.error
            else "reinstall numagraft for this Python: pip install --force-reinstall numagraft",
        )
        return
    if backend.sanitizer:
        yield Finding(
            "hurts",
            "sanitizer",
            f"the backend was built with the {backend.sanitizer} sanitizer, which is slow",
            "reinstall without NUMAGRAFT_SANITIZE",
        )
    if backend.forced:
        best = next((row for row in platform.isa if row in backend.supported), backend.isa)
        yield Finding(
            "note" if backend.isa == best else "hurts",
            "isa-forced",
            f"NUMAGRAFT_ISA forces {backend.isa}" + ("" if backend.isa == best else f"; {best} would run here"),
            "unset NUMAGRAFT_ISA",
        )
    else:
        unused = [row for row in platform.isa if row not in backend.supported]
        if unused and platform.isa[0] in unused:
            yield Finding(
                "advice",
                "isa-unused",
                f"the CPU can run {unused[0]}, but the backend has no such kernels and uses {backend.isa}",
                "install a build of numagraft made with a newer compiler",
            )
