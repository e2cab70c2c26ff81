"""Limits of control groups, version 1 and 2, as the process sees them from inside its container."""

from __future__ import annotations

import posixpath
from dataclasses import replace

from numagraft.platform.facts import Cgroup
from numagraft.platform.ids import parse_int, parse_list
from numagraft.platform.tree import Tree

#: Version 1 writes "no limit" as the largest multiple of a page; anything this large is none.
_UNLIMITED = 1 << 60
_DEPTH = 64


def read_cgroup(tree: Tree) -> Cgroup:
    """The tightest limits between this process's groups and the root of each mounted hierarchy."""
    groups = _groups(tree)
    mounts = _mounts(tree)
    unified = groups.get("")
    result = Cgroup()
    if unified is not None and "" in mounts:
        result = _read_unified(tree, _folders(mounts[""], unified))
    for controller in ("memory", "cpuset", "cpu"):
        if controller in groups and controller in mounts:
            result = _read_legacy(tree, controller, _folders(mounts[controller], groups[controller]), result)
    legacy = groups.get("memory", groups.get("cpuset"))
    if result.version and legacy is not None:
        # Both are mounted ("hybrid"): the controllers that limit memory and CPUs hang in the old hierarchies.
        return replace(result, version=1, path=legacy)
    return replace(result, path=unified or "") if result.version else result


def _groups(tree: Tree) -> dict[str, str]:
    """Controller -> path, "" for the unified hierarchy."""
    groups = {}
    for line in (tree.read("/proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[2].startswith("/"):
            for controller in parts[1].split(","):
                groups[controller] = parts[2]
    return groups


def _mounts(tree: Tree) -> dict[str, tuple[str, str]]:
    """Controller -> (mount point, the group that is mounted there)."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in (tree.read("/proc/self/mountinfo", 1 << 20) or "").splitlines():
        before, separator, after = line.partition(" - ")
        head, tail = before.split(), after.split()
        if not separator or len(head) < 5 or len(tail) < 3:
            continue
        if tail[0] == "cgroup2":
            mounts.setdefault("", (head[4], head[3]))
        elif tail[0] == "cgroup":
            for controller in tail[2].split(","):
                mounts.setdefault(controller, (head[4], head[3]))
    return mounts or _usual_mounts(tree)


def _usual_mounts(tree: Tree) -> dict[str, tuple[str, str]]:
    """Where hierarchies stand by custom, for dumps without mountinfo."""
    root = "/sys/fs/cgroup"
    names = tree.entries(root)
    if "cgroup.controllers" in names:
        return {"": (root, "/")}
    return {
        part: (f"{root}/{name}", "/") for name in names for part in name.split(",") if tree.entries(f"{root}/{name}")
    }


def _folders(mount: tuple[str, str], group: str) -> list[str]:
    """The group's folder and those of its ancestors. In a container the path may start above what is mounted."""
    point, root = mount
    inside = posixpath.normpath(group)
    if root != "/" and (inside == root or inside.startswith(root + "/")):
        inside = inside[len(root) :] or "/"
    folders = []
    while len(folders) < _DEPTH:
        folders.append(posixpath.normpath(point + "/" + inside.lstrip("/")))
        if inside in ("/", "."):
            break
        inside = posixpath.dirname(inside)
    return folders


def _read_unified(tree: Tree, folders: list[str]) -> Cgroup:
    limit = used = quota = cpus = mems = None
    reclaimable = 0
    for folder in folders:
        for name in ("memory.max", "memory.high"):
            value = parse_int(tree.read(f"{folder}/{name}"))
            if value is not None and 0 <= value < _UNLIMITED and (limit is None or value < limit):
                limit = value
                used = parse_int(tree.read(f"{folder}/memory.current"))
                reclaimable = _file_cache(tree.read(f"{folder}/memory.stat"), "active_file", "inactive_file")
        share = (tree.read(f"{folder}/cpu.max") or "").split()
        if len(share) == 2:
            quota = _tightest(quota, parse_int(share[0]), parse_int(share[1]))
        cpus = cpus or parse_list(tree.read(f"{folder}/cpuset.cpus.effective")) or None
        mems = mems or parse_list(tree.read(f"{folder}/cpuset.mems.effective")) or None
    return Cgroup(2, "", limit, used, reclaimable, quota, cpus, mems)


def _read_legacy(tree: Tree, controller: str, folders: list[str], found: Cgroup) -> Cgroup:
    for folder in folders:
        if controller == "memory":
            value = parse_int(tree.read(f"{folder}/memory.limit_in_bytes"))
            if (
                value is not None
                and 0 <= value < _UNLIMITED
                and (found.memory_limit is None or value < found.memory_limit)
            ):
                found = replace(
                    found,
                    memory_limit=value,
                    memory_used=parse_int(tree.read(f"{folder}/memory.usage_in_bytes")),
                    memory_reclaimable=_file_cache(
                        tree.read(f"{folder}/memory.stat"), "total_active_file", "total_inactive_file"
                    ),
                )
        elif controller == "cpu":
            share = parse_int(tree.read(f"{folder}/cpu.cfs_quota_us"))
            period = parse_int(tree.read(f"{folder}/cpu.cfs_period_us"))
            found = replace(found, cpu_quota=_tightest(found.cpu_quota, share, period))
        else:
            for kind in ("cpus", "mems"):
                if getattr(found, kind) is None:
                    text = tree.read(f"{folder}/cpuset.effective_{kind}") or tree.read(f"{folder}/cpuset.{kind}")
                    numbers = parse_list(text)
                    found = replace(found, **{kind: numbers or None})
        if tree.entries(folder):
            found = replace(found, version=1)
    return found


def _tightest(quota: float | None, share: int | None, period: int | None) -> float | None:
    if share is None or period is None or share <= 0 or period <= 0:
        return quota
    return share / period if quota is None else min(quota, share / period)


def _file_cache(text: str | None, *names: str) -> int:
    total = 0
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        if key in names:
            total += max(0, parse_int(value) or 0)
    return total
