"""GPUs from the PCI bus: no driver library is loaded."""

from __future__ import annotations

import re

from numagraft.platform.facts import Gpu
from numagraft.platform.ids import parse_int, parse_list
from numagraft.platform.tree import Tree

_SYS = "/sys/bus/pci/devices"
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
_VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
_DISPLAY, _ACCELERATOR = "0x03", "0x12"
#: Graphics of server boards (ASPEED, Matrox, virtual machines) are no place to compute.
_CONSOLES = {"0x1a03", "0x102b", "0x1234", "0x1b36", "0x1af4", "0x15ad", "0x1013", "0x80ee", "0x1414"}


def read_gpus(tree: Tree) -> tuple[Gpu, ...]:
    """Display controllers and processing accelerators that can compute, by PCI address."""
    found = []
    for address in tree.entries(_SYS):
        folder = f"{_SYS}/{address}"
        if not _ADDRESS.match(address):
            continue
        kind = tree.read(f"{folder}/class") or ""
        vendor = tree.read(f"{folder}/vendor") or ""
        if not kind.startswith((_DISPLAY, _ACCELERATOR)) or vendor in _CONSOLES:
            continue
        node = parse_int(tree.read(f"{folder}/numa_node"))
        speed = tree.read(f"{folder}/current_link_speed") or ""
        width = tree.read(f"{folder}/current_link_width") or ""
        found.append(
            Gpu(
                address=address,
                vendor=_VENDORS.get(vendor, vendor),
                device=_device_name(tree, address) or tree.read(f"{folder}/device") or "",
                node=node if node is not None and node >= 0 else None,
                cpus=parse_list(tree.read(f"{folder}/local_cpulist")) or (),
                memory_bytes=_amd_memory(tree, folder),
                driver=_driver(tree, folder),
                link=f"{speed} x{width}" if speed and width and not speed.startswith("Unknown") else "",
            )
        )
    return tuple(found)


def _device_name(tree: Tree, address: str) -> str | None:
    for line in (tree.read(f"/proc/driver/nvidia/gpus/{address}/information") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Model":
            return value.strip()
    return tree.read(f"{_SYS}/{address}/product_name")


def _driver(tree: Tree, folder: str) -> str:
    for line in (tree.read(f"{folder}/uevent") or "").splitlines():
        if line.startswith("DRIVER="):
            return line[len("DRIVER=") :]
    return ""


def _amd_memory(tree: Tree, folder: str) -> int | None:
    # amdgpu alone tells. A window on the bus is a power of two, larger than the memory or much smaller.
    told = parse_int(tree.read(f"{folder}/mem_info_vram_total"))
    return told if told is not None and told > 0 else None
