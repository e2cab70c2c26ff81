"""The example package, built and installed as a third party's, used by its rule file in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "custom_operator"

SCRIPT = """
import json, sys
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from numagraft import optimize
from numagraft.registry import operator_table

torch.manual_seed(0)
config = Qwen2MoeConfig(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=48, shared_expert_intermediate_size=80, vocab_size=131,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
)
model = Qwen2MoeForCausalLM(config).eval()
ids = torch.tensor([[1, 5, 9, 30]])
with torch.no_grad():
    expected = model(ids).logits
    numel = model.num_parameters()
    grafted = optimize(model, sys.argv[1])
    error = (grafted(ids).logits - expected).abs().max().item()
gates = [type(layer.mlp.shared_expert_gate).__name__ for layer in grafted.model.layers]
print(json.dumps({
    "registered": operator_table()["float32_linear"], "linear": operator_table()["linear"],
    "gates": gates, "error": error, "numel": grafted.num_parameters() == numel,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", reason="setuptools, the example's build backend, is not installed")
    source = tmp_path_factory.mktemp("source") / "custom_operator"
    source.mkdir()
    for path in EXAMPLE.rglob("*"):  # a copy: building writes beside the sources
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(EXAMPLE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    target = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    return target


def run(rules: Path, site: Path | None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(site or ""))
    command = [sys.executable, "-c", SCRIPT, str(rules)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_installed_package_adds_its_operator(site):
    done = run(EXAMPLE / "rules.yaml", site)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["registered"] == "float32_linear:Float32Linear"
    assert found["linear"] == "numagraft.operators.linear:Linear"
    assert found["gates"] == ["Float32Linear"] * 2
    assert found["error"] < 1e-5 and found["numel"]


@pytest.mark.slow
def test_its_kwargs_are_checked_like_any_others(site, tmp_path):
    rules = tmp_path / "typo.yaml"
    rules.write_text((EXAMPLE / "rules.yaml").read_text().replace("keep_output", "keep_ouptut"))
    done = run(rules, site)
    assert done.returncode != 0 and "keep_ouptut" in done.stderr and "keep_output" in done.stderr


@pytest.mark.slow
def test_without_the_package_the_name_is_unknown():
    done = run(EXAMPLE / "rules.yaml", None)
    assert done.returncode != 0 and "no operator is registered as 'float32_linear'" in done.stderr
