"""Memory slots from the firmware's tables: which are empty, and whether channels are filled evenly."""

from __future__ import annotations

import re

from numagraft.platform.facts import MemoryModule
from numagraft.platform.ids import parse_int
from numagraft.platform.tree import Tree

_ENTRIES = "/sys/firmware/dmi/entries"
_EDAC = "/sys/devices/system/edac/mc"
_MEMORY_DEVICE = 17
#: SMBIOS 3.7, section 7.18.2.
_KINDS = {
    0x18: "DDR3",
    0x1A: "DDR4",
    0x1E: "LPDDR4",
    0x20: "HBM",
    0x21: "HBM2",
    0x22: "DDR5",
    0x23: "LPDDR5",
    0x24: "HBM3",
}


def read_memory_modules(tree: Tree) -> tuple[MemoryModule, ...]:
    """Every slot that the SMBIOS names (only root may read it), else the filled ones that memory controllers report."""
    slots = [name for name in tree.entries(_ENTRIES) if re.fullmatch(r"17-\d{1,4}", name)]
    slots.sort(key=lambda name: int(name[3:]))
    modules = [parse_memory_device(tree.read_bytes(f"{_ENTRIES}/{name}/raw", 4096)) for name in slots]
    found = tuple(module for module in modules if module is not None)
    return found or _read_edac(tree)


def parse_memory_device(raw: bytes | None) -> MemoryModule | None:
    """One SMBIOS structure of type 17; None where the bytes are not one."""
    if not raw or len(raw) < 4 or raw[0] != _MEMORY_DEVICE or raw[1] > len(raw) or raw[1] < 0x15:
        return None
    length = raw[1]
    strings = raw[length:].split(b"\0")

    def text(offset: int) -> str:
        number = raw[offset] if offset < length else 0
        value = strings[number - 1] if 0 < number <= len(strings) else b""
        return value.decode("ascii", "replace").strip()

    def word(offset: int, size: int = 2) -> int:
        return int.from_bytes(raw[offset : offset + size], "little") if offset + size <= length else 0

    size = word(0x0C)
    if size == 0x7FFF:
        amount = (word(0x1C, 4) & 0x7FFFFFFF) << 20
    elif size == 0xFFFF:
        amount = 0
    else:
        amount = (size & 0x7FFF) << (10 if size & 0x8000 else 20)
    speed = word(0x20) or word(0x15)
    return MemoryModule(
        locator=text(0x10),
        bank=text(0x11),
        bytes=amount,
        mega_transfers=speed if 0 < speed < 0xFFFF else None,
        kind=_KINDS.get(raw[0x12], ""),
    )


def _read_edac(tree: Tree) -> tuple[MemoryModule, ...]:
    found = []
    for controller in tree.entries(_EDAC):
        if re.fullmatch(r"mc\d{1,3}", controller):
            for name in tree.entries(f"{_EDAC}/{controller}"):
                folder = f"{_EDAC}/{controller}/{name}"
                megabytes = (
                    parse_int(tree.read(f"{folder}/size")) if re.fullmatch(r"(dimm|rank)\d{1,3}", name) else None
                )
                if megabytes is not None and 0 <= megabytes < 1 << 30:
                    found.append(
                        MemoryModule(
                            locator=tree.read(f"{folder}/dimm_label") or name,
                            bank=f"{controller} {tree.read(f'{folder}/dimm_location') or ''}".strip(),
                            bytes=megabytes << 20,
                            kind=tree.read(f"{folder}/dimm_mem_type") or "",
                        )
                    )
    return tuple(found)
