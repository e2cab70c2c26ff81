"""Which kernel row runs, and that no ISA's object can leak code into another's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_operands import ISAS, parts, runtime

from numagraft.errors import ConfigurationError
from numagraft.native import LinearWeights, WeightFormat, capabilities

ROOT = Path(__file__).resolve().parents[2]


def in_use(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from numagraft import native; c = native.capabilities(); print(c.isa, c.forced)"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"NUMAGRAFT_ISA": isa}, capture_output=True, text=True, timeout=120
    )


def test_the_best_row_is_used():
    if "NUMAGRAFT_ISA" not in os.environ:
        assert capabilities().isa == ISAS[-1] and not capabilities().forced
    assert ISAS[0] == "scalar"


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_can_be_forced(isa):
    assert in_use(isa).stdout.split() == [isa, "True"]


@pytest.mark.skipif("avx2" not in ISAS, reason="this CPU has no AVX2")
def test_a_row_can_be_had_in_either_order():
    assert in_use("avx2:in-order").stdout.split() == in_use("avx2:in-turn").stdout.split() == ["avx2", "True"]
    assert "no kernels for 'avx2:sideways'" in in_use("avx2:sideways").stderr


def test_an_unsupported_row_is_an_error():
    run = in_use("avx1024")
    assert run.returncode != 0 and "ConfigurationError" in run.stderr
    assert "NUMAGRAFT_ISA" in run.stderr and all(isa in run.stderr for isa in ISAS)
    with pytest.raises(ConfigurationError, match="no kernels for 'avx1024'"):
        LinearWeights(
            runtime(),
            out_features=1,
            in_features=1,
            format=WeightFormat(),
            parts=parts("bind", 1, 1),
            has_bias=False,
            owner="m",
            isa="avx1024",
        )


def weak_symbols(path: Path) -> list[str]:
    listed = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    # v/w are undefined weak references, V/W/u definitions that the linker may keep for everyone
    return [line for line in listed.splitlines() if line[17:18] in "VWu"]


def test_isa_objects_export_nothing_weak(tmp_path):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    objects = [path for isa in ISAS for path in ROOT.glob(f"build/*/kernels/CMakeFiles/numagraft_{isa}.dir/*.o")]
    if not objects:
        pytest.skip("no build tree beside the tests: an installed wheel has no objects")
    assert len(objects) >= 5 * len(ISAS)
    assert {path.name: weak for path in objects if (weak := weak_symbols(path))} == {}
    # the control: an inline function that is not inlined is what this looks for
    source = tmp_path / "weak.cpp"
    source.write_text("struct S { int f(int x) { return x + 1; } };\nint (S::*p)(int) = &S::f;\n")
    subprocess.run(["c++", "-c", str(source), "-o", str(tmp_path / "weak.o")], check=True)
    assert weak_symbols(tmp_path / "weak.o")
