"""The error bars, on Gaussian data and on the real model's activations, on every instruction set this machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from grafting import EXPERTS_BARS, LINEAR_BARS

from numagraft import native

SCRIPT = Path(__file__).with_name("operator_error.py")
BARS = {"linear": LINEAR_BARS, "experts": EXPERTS_BARS}
# rounding the output to bfloat16, which no kernel can avoid, in quadrature
BF16_OUTPUT = 1.7e-3


def run(*arguments: str, isa: str | None = None) -> str:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(SCRIPT.parent.parent.parent))))
    environment = dict(os.environ, OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=path)
    environment.pop("NUMAGRAFT_ISA", None)
    if isa is not None:
        environment["NUMAGRAFT_ISA"] = isa
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def captured(smollm2_gguf, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("activations") / "smollm2.safetensors"
    run("capture", str(path))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.capabilities().supported)
def test_the_error_is_within_its_bar(isa, captured):
    rows = [json.loads(line) for line in run("measure", captured, isa=isa).splitlines()]
    assert {(row["operator"], row["format"]) for row in rows} == {(o, f) for o in BARS for f in ("bf16", "int8", "int4")}
    beyond = [row for row in rows if not row["error"] <= limit(row)]
    assert not beyond, "\n".join(map(str, sorted(beyond, key=lambda row: -row["error"])[:12]))


def limit(row: dict) -> float:
    bar = BARS[row["operator"]][row["format"]]
    return bar if row["dtype"] == "float32" else (bar**2 + BF16_OUTPUT**2) ** 0.5
