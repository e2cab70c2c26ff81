"""What this process may do: restrictions, refused system calls, and OpenMP settings that get in the way."""

from __future__ import annotations

from collections.abc import Iterator

from numagraft.doctor.circumstances import Circumstances
from numagraft.doctor.finding import Finding
from numagraft.platform import Platform
from numagraft.platform.ids import format_list
from numagraft.sizes import format_size

_UNFILTERED = (
    "docker run --cap-add SYS_NICE (or --security-opt seccomp=unconfined); Kubernetes: capabilities.add SYS_NICE"
)


def judge_process(circumstances: Circumstances) -> Iterator[Finding]:
    platform = circumstances.platform
    yield from _restrictions(platform)
    yield from _control_group(platform)
    if circumstances.refused is not None:
        yield from _system_calls(circumstances)
    if platform.live:
        yield from _openmp(circumstances)


def _restrictions(platform: Platform) -> Iterator[Finding]:
    online = {cpu.id for cpu in platform.cpus if cpu.online}
    if len(platform.allowed_cpus) < len(online):
        yield Finding(
            "note",
            "affinity",
            f"{len(platform.allowed_cpus)} of {len(online)} CPUs are allowed: {format_list(platform.allowed_cpus)}",
            "taskset, numactl --cpunodebind, a cpuset, a container or Slurm set this; OMP_PROC_BIND pins too",
        )
    with_memory = [node.id for node in platform.nodes if node.has_memory]
    if with_memory and len(platform.allowed_nodes) < len(with_memory):
        yield Finding(
            "note",
            "mems-allowed",
            f"memory of nodes {format_list(platform.allowed_nodes)} is allowed, of {format_list(with_memory)}",
            "numactl --membind, a cpuset (docker --cpuset-mems) or Slurm set this",
        )
    if not platform.usable_nodes:
        yield Finding(
            "hurts",
            "apart",
            f"CPUs {format_list(platform.allowed_cpus)} and the memory of nodes {format_list(platform.allowed_nodes)} are on "
            "different nodes: everything is read remotely",
            "allow CPUs and memory of the same nodes (numactl --cpunodebind=N --membind=N)",
        )
    if not platform.policy.is_default and platform.policy.mode != "unknown":
        nodes = f" over nodes {format_list(platform.policy.nodes)}" if platform.policy.nodes else ""
        yield Finding(
            "advice",
            "memory-policy",
            f"the process inherited the memory policy {platform.policy.mode}{nodes}; weights go where rules say, but all "
            "other memory (activations, caches, GPU staging) follows it",
            "start without numactl: numagraft places by itself",
        )


def _control_group(platform: Platform) -> Iterator[Finding]:
    group = platform.cgroup
    total = sum(node.total_bytes for node in platform.nodes if node.id in platform.allowed_nodes)
    if group.memory_limit is not None and group.memory_limit < total:
        left = group.memory_available or 0
        yield Finding(
            "note" if left > group.memory_limit // 10 else "advice",
            "memory-limit",
            f"the control group allows {format_size(group.memory_limit)} of {format_size(total)}; "
            f"{format_size(left)} are left",
            "docker run --memory, systemd MemoryMax=, Kubernetes limits.memory or Slurm --mem set this",
        )
    if group.cpu_quota is not None and group.cpu_quota < len(platform.cores()):
        yield Finding(
            "advice",
            "cpu-quota",
            f"the control group pays for {group.cpu_quota:g} CPUs of {len(platform.cores())} cores: threads beyond are "
            "stopped together for the rest of every period",
            "give whole CPUs (docker --cpuset-cpus, Kubernetes static CPU manager) instead of a quota (--cpus)",
        )


def _system_calls(circumstances: Circumstances) -> Iterator[Finding]:
    refused = circumstances.refused or {}
    platform = circumstances.platform
    several = len(platform.usable_nodes) > 1
    where = f" in this {platform.kernel.container} container" if platform.kernel.container else ""

    def told(*names: str) -> str:
        return ", ".join(f"{name}: {refused[name]}" for name in names if name in refused)

    if refused.get("mbind") == "misplaced":
        yield Finding(
            "hurts",
            "binding",
            "mbind reports success, but the page then lies elsewhere: this kernel does not place memory",
            "a sandbox (gVisor) that ignores policies: use another runtime class",
        )
    elif "mbind" in refused:
        other = "set_mempolicy" if "set_mempolicy" not in refused else "first touch by pinned threads"
        lost = "set_mempolicy" in refused and "sched_setaffinity" in refused
        yield Finding(
            "hurts" if lost and several else "advice" if several else "note",
            "binding",
            f"the kernel refuses placement calls{where} ({told('mbind', 'set_mempolicy')}); "
            + ("nothing can be placed" if lost else f"memory is placed by {other} instead"),
            _UNFILTERED,
        )
    elif "set_mempolicy" in refused:
        yield Finding("note", "binding", f"set_mempolicy is refused{where} ({refused['set_mempolicy']}); mbind works")
    if "sched_setaffinity" in refused:
        yield Finding(
            "hurts",
            "pinning",
            f"threads cannot be pinned{where} ({refused['sched_setaffinity']}): they wander between nodes",
            "allow sched_setaffinity in the container's seccomp profile",
        )
    if "move_pages" in refused:
        yield Finding(
            "note",
            "page-query",
            f"move_pages is refused{where} ({refused['move_pages']}): placement is verified by /proc/self/numa_maps instead",
            _UNFILTERED,
        )
    if "get_mempolicy" in refused and not {"mbind", "move_pages"} & set(refused):
        yield Finding("note", "policy-query", f"get_mempolicy is refused{where}: an inherited policy cannot be seen")


def _openmp(circumstances: Circumstances) -> Iterator[Finding]:
    environment = circumstances.environment
    wait = environment.get("OMP_WAIT_POLICY", "").lower()
    spins = [
        f"{name}={environment[name]}"
        for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        if name in environment and environment[name].strip().lower() not in ("0", "0ms", "0us")
    ]
    if wait == "active" or spins:
        found = ", ".join([*(["OMP_WAIT_POLICY=ACTIVE"] if wait == "active" else []), *spins])
        yield Finding(
            "hurts",
            "openmp-spinning",
            f"{found}: torch's threads spin after each parallel region on the cores that numagraft's threads need",
            "export OMP_WAIT_POLICY=PASSIVE before torch is imported",
        )
    elif wait != "passive":
        yield Finding(
            "note",
            "openmp-spinning",
            "OMP_WAIT_POLICY is not set: torch's threads spin for milliseconds after each parallel region",
            "export OMP_WAIT_POLICY=PASSIVE before torch is imported (numagraft's commands set it themselves)",
        )
    pins = [
        f"{name}={environment[name]}"
        for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
        if environment.get(name, "false").lower() not in ("false", "none", "disabled", "")
    ]
    if pins:
        yield Finding(
            "advice",
            "openmp-pinning",
            f"{', '.join(pins)}: OpenMP pins the main thread to one CPU, and numagraft may then use only that one",
            "unset it: numagraft pins its threads by itself",
        )
    asked = environment.get("OMP_NUM_THREADS", "")
    cores = len(circumstances.platform.cores())
    if asked.isdigit() and int(asked) > cores:
        yield Finding(
            "advice",
            "openmp-threads",
            f"OMP_NUM_THREADS={asked}, but there are {cores} cores",
            f"export OMP_NUM_THREADS={cores}",
        )
