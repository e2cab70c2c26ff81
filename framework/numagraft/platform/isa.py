"""Which instruction sets a CPU has and a process may use here."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

from numagraft.platform.tree import Tree

_AVX512 = frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"})

#: What each kernel row needs, as /proc/cpuinfo spells it. The kernel leaves out a flag whose registers it does not
#: save, so a flag stands for the CPU and the operating system.
REQUIRED_FLAGS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "amx": _AVX512 | {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"},
}

#: The widest first: what a row replaces.
ISA_ORDER = ("amx", "avx512_vnni", "avx512", "avx2", "scalar")

_KEPT_FLAGS = re.compile(
    r"(sse4_[12]|ssse3|avx\w*|fma|f16c|bmi[12]|amx_\w+|asimd\w*|sve\w*|sme|sme2|i8mm|bf16|fphp|hypervisor|ht)$"
)

_ARM_VENDORS = {"0x41": "ARM", "0x4e": "NVIDIA", "0xc0": "Ampere", "0x48": "HiSilicon", "0x46": "Fujitsu"}
_ARM_MODELS = {"0xd4f": "Neoverse V2", "0xd40": "Neoverse V1", "0xd0c": "Neoverse N1", "0xd49": "Neoverse N2"}
_VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "Hygon"}

_ARCH_GET_XCOMP_SUPP = 0x1021
_XTILEDATA = 18
_ARCH_PRCTL = 158


@dataclass(frozen=True)
class CpuModel:
    """Vendor, model name and features of the first processor; `blocked` are features that cannot be used here."""

    arch: str = ""
    vendor: str = ""
    model: str = ""
    features: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    @property
    def isa(self) -> tuple[str, ...]:
        """The kernel rows this CPU can run, widest first, "scalar" always."""
        usable = set(self.features) - set(self.blocked)
        return tuple(row for row in ISA_ORDER if row == "scalar" or REQUIRED_FLAGS[row] <= usable)


def read_cpu_model(tree: Tree) -> CpuModel:
    """Reads the first block of /proc/cpuinfo: the rest repeats it, and costs a large machine tens of milliseconds."""
    text = tree.read("/proc/cpuinfo", 1 << 14) or ""
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), " ".join(value.split()))
    flags = (fields.get("flags") or fields.get("features") or "").split()
    features = tuple(sorted({flag for flag in flags if _KEPT_FLAGS.match(flag)}))
    if "cpu implementer" in fields:
        arch = "aarch64"
        vendor = _ARM_VENDORS.get(fields["cpu implementer"], fields["cpu implementer"])
        part = fields.get("cpu part", "")
        model = fields.get("model name") or _ARM_MODELS.get(part, part)
    else:
        arch = "x86_64" if "lm" in flags or "vendor_id" in fields else ""
        vendor = _VENDORS.get(fields.get("vendor_id", ""), fields.get("vendor_id", ""))
        model = fields.get("model name", "")
    blocked: tuple[str, ...] = ()
    if tree.live and "amx_tile" in features and not _tiles_permitted():
        blocked = tuple(feature for feature in features if feature.startswith("amx_"))
    return CpuModel(arch=arch, vendor=vendor, model=model, features=features, blocked=blocked)


def _tiles_permitted() -> bool:
    """Whether the kernel offers tile registers to this process (it may not: a seccomp filter, an old kernel)."""
    mask = ctypes.c_uint64(0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, ctypes.c_long(_ARCH_GET_XCOMP_SUPP), ctypes.byref(mask)) != 0:
        return False
    return bool(mask.value >> _XTILEDATA & 1)
