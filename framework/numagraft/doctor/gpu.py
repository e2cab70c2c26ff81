"""GPUs: where they hang, what they hold, and whether several processes share them."""

from __future__ import annotations

from collections.abc import Iterator

from numagraft.doctor.circumstances import Circumstances
from numagraft.doctor.finding import Finding
from numagraft.platform.ids import format_list
from numagraft.sizes import format_size

_SMALL_MEMLOCK = 1 << 30


def judge_gpus(circumstances: Circumstances) -> Iterator[Finding]:
    platform = circumstances.platform
    several = sum(bool(node.cpus) for node in platform.nodes) > 1
    for gpu in platform.gpus:
        memory = f", {format_size(gpu.memory_bytes)}" if gpu.memory_bytes else ""
        link = f", {gpu.link}" if gpu.link else ""
        near = f"nearest node {gpu.node}" if gpu.node is not None else "nearest node unknown"
        yield Finding("note", "gpu", f"{gpu.address} {gpu.name}: {near}{memory}{link}, driver {gpu.driver or 'none'}")
        if several and gpu.node is None:
            yield Finding(
                "advice",
                "gpu-node",
                f"the firmware does not tell which node {gpu.address} hangs on: staging buffers may be remote",
                "update the firmware, or see the board's manual for the slot's socket",
            )
        if gpu.node is not None and gpu.node not in platform.allowed_nodes:
            yield Finding(
                "advice",
                "gpu-node",
                f"{gpu.address} hangs on node {gpu.node}, but this process may use memory of nodes "
                f"{format_list(platform.allowed_nodes)} only: every transfer crosses the sockets",
                f"allow node {gpu.node}, or take a GPU nearer by (CUDA_VISIBLE_DEVICES)",
            )
        if not gpu.driver:
            yield Finding("advice", "gpu-driver", f"{gpu.address} has no driver bound", "install or load its driver")
    if not platform.gpus or not platform.live:
        return
    if circumstances.mps:
        yield Finding(
            "note", "mps", "the MPS daemon runs: processes share the GPUs, and one that dies can take others along"
        )
    closed = [address for address, mode in circumstances.compute_modes.items() if mode == "Prohibited"]
    single = [address for address, mode in circumstances.compute_modes.items() if mode == "Exclusive_Process"]
    if closed or (single and not circumstances.mps):
        yield Finding(
            "hurts" if closed else "advice",
            "gpu-compute-mode",
            f"compute mode {'Prohibited' if closed else 'Exclusive_Process'} on {', '.join(closed or single)}: "
            + ("nothing may compute there" if closed else "one process at a time, as there is no MPS daemon"),
            "nvidia-smi -c DEFAULT (as root)",
        )
    if platform.memlock_bytes is not None and platform.memlock_bytes < _SMALL_MEMLOCK:
        yield Finding(
            "advice",
            "memlock",
            f"RLIMIT_MEMLOCK is {format_size(platform.memlock_bytes)}: pinned staging buffers for the GPU may be refused",
            "ulimit -l unlimited (docker run --ulimit memlock=-1)",
        )
