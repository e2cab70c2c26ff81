"""The machine: nodes, CPUs, memory and limits, from its own files or from a dump. No torch, no native backend."""

from __future__ import annotations

from numagraft.platform.facts import Cgroup, Cpu, Gpu, HugePages, Kernel, MemoryModule, MemoryPolicy, Node
from numagraft.platform.isa import CpuModel
from numagraft.platform.machine import Platform

__all__ = [
    "Cgroup",
    "Cpu",
    "CpuModel",
    "Gpu",
    "HugePages",
    "Kernel",
    "MemoryModule",
    "MemoryPolicy",
    "Node",
    "Platform",
]
