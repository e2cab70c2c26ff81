"""Settings of the running kernel that decide over speed and over whether large models can be mapped."""

from __future__ import annotations

import re

from numagraft.platform.facts import Kernel
from numagraft.platform.ids import parse_int
from numagraft.platform.tree import Tree

_CHOSEN = re.compile(r"\[([a-z+]+)\]")


def read_kernel(tree: Tree, cpus: tuple[int, ...]) -> Kernel:
    """`cpus`: the online ones, whose governors are asked."""

    def setting(name: str) -> int | None:
        return parse_int(tree.read(f"/proc/sys/{name}"))

    def choice(name: str) -> str:
        match = _CHOSEN.search(tree.read(f"/sys/kernel/mm/transparent_hugepage/{name}") or "")
        return match[1] if match else ""

    return Kernel(
        release=(tree.read("/proc/sys/kernel/osrelease", 256) or "").partition("\n")[0],
        numa_balancing=read_numa_balancing(tree),
        transparent_hugepage=choice("enabled"),
        transparent_defrag=choice("defrag"),
        max_map_count=setting("vm/max_map_count"),
        overcommit_memory=setting("vm/overcommit_memory"),
        overcommit_ratio=setting("vm/overcommit_ratio"),
        zone_reclaim_mode=setting("vm/zone_reclaim_mode"),
        governors=_governors(tree, cpus),
        smt=(tree.read("/sys/devices/system/cpu/smt/control", 64) or "").partition("\n")[0],
        container=_container(tree),
    )


def read_numa_balancing(tree: Tree) -> int | None:
    """0: off; anything else: the kernel moves pages towards whoever reads them."""
    return parse_int(tree.read("/proc/sys/kernel/numa_balancing"))


def _governors(tree: Tree, cpus: tuple[int, ...]) -> tuple[str, ...]:
    policies = [name for name in tree.entries("/sys/devices/system/cpu/cpufreq") if name.startswith("policy")]
    paths = [f"/sys/devices/system/cpu/cpufreq/{name}/scaling_governor" for name in policies]
    if not paths:
        paths = [f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor" for cpu in cpus[:1]]
    return tuple(sorted({governor for path in paths if (governor := tree.read(path, 64))}))


def _container(tree: Tree) -> str:
    if tree.exists("/.dockerenv"):
        return "docker"
    if tree.exists("/run/.containerenv"):
        return "podman"
    groups = tree.read("/proc/self/cgroup") or ""
    for word, name in (("kubepods", "kubernetes"), ("/docker", "docker"), ("libpod", "podman"), ("/lxc", "lxc")):
        if word in groups:
            return name
    return ""
