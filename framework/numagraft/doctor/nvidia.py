"""What NVIDIA's driver says of its GPUs: sysfs shows neither their memory nor their compute mode."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from numagraft.platform import Platform
from numagraft.platform.ids import parse_int

_FIELDS = "pci.bus_id,name,memory.total,compute_mode"
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class DriverFacts:
    name: str
    memory_bytes: int | None
    compute_mode: str  # Default | Exclusive_Process | Prohibited


def ask_nvidia_driver() -> dict[str, DriverFacts]:
    """PCI address -> facts, through nvidia-smi; empty where it is missing, fails, or takes too long."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        answer = subprocess.run(
            [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_answer(answer.stdout)


def parse_answer(text: str) -> dict[str, DriverFacts]:
    """Lines such as "00000000:3B:00.0, NVIDIA H100 80GB HBM3, 81559, Default"; others are skipped."""
    found = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 4 and words[0].count(":") == 2:
            domain, _, rest = words[0].lower().partition(":")
            mebibytes = parse_int(words[2])
            memory = mebibytes << 20 if mebibytes is not None and mebibytes > 0 else None
            found[f"{domain[-4:]}:{rest}"] = DriverFacts(words[1], memory, words[3])
    return found


def with_driver_facts(platform: Platform, facts: Mapping[str, DriverFacts]) -> Platform:
    """The platform with the GPUs' names and memory filled in."""
    return replace(
        platform,
        gpus=tuple(
            replace(gpu, device=known.name.removeprefix("NVIDIA "), memory_bytes=known.memory_bytes)
            if (known := facts.get(gpu.address))
            else gpu
            for gpu in platform.gpus
        ),
    )
