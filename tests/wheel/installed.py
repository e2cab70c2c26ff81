"""What a user gets from the wheel; run by `run.py` from a folder outside the source tree."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_package_comes_from_the_wheel():
    spec = importlib.util.find_spec("numagraft")
    assert Path(spec.origin).is_relative_to(sys.prefix)


@pytest.mark.parametrize("name", ["numagraft.tests", "numagraft.benchmarks", "numagraft.native.CMakeLists"])
def test_nothing_else_of_the_tree_is_inside(name):
    assert importlib.util.find_spec(name) is None


def test_import_is_lean():
    code = "import numagraft, sys; print('torch' in sys.modules, 'numagraft._native' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_presets_are_data_in_the_wheel():
    from importlib.resources import files

    names = [path.name for path in files("numagraft.rules").rglob("*.yaml")] if hasattr(
        files("numagraft.rules"), "rglob"
    ) else []
    assert names, "no preset was packaged"


def test_console_script_runs():
    script = Path(sys.prefix) / "bin" / "numagraft"
    shown = subprocess.run([script, "doctor", "--json"], capture_output=True, text=True, check=False)
    assert shown.returncode in (0, 1), shown.stderr
    assert json.loads(shown.stdout.strip().splitlines()[-1])


def test_the_installed_example_package_is_found():
    """`run.py` has installed `examples/preset-package` beside the wheel; its package is found and never imported."""
    script = Path(sys.prefix) / "bin" / "numagraft"
    listed = subprocess.run([script, "rules", "list", "--json"], capture_output=True, text=True, check=True).stdout
    assert '"example/small-and-exact"' in listed and '"platform/one-node"' in listed
    code = (
        "import sys; from numagraft.presets import find; find('example/small-and-exact').manifest(); "
        "print('numagraft_presets_example' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "False", found.stderr


def test_a_model_is_grafted_and_proven():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from numagraft import optimize

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        grafted = optimize(model, rules="auto", overrides=["vars.format=int8"])
        found = grafted(tokens).logits
    assert grafted.placement_report().ok
    assert (found - expected).norm() <= 0.05 * expected.norm()
