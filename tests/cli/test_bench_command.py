"""bench measures what generate does, and --share writes a manifest that holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numagraft.cli import bench_command
from numagraft.errors import ConfigurationError, RuleError
from numagraft.platform import Platform
from numagraft.rulefile.manifest import read_manifest
from tests.planning import small

RESULT = {
    "date": "2026-01-31",
    "machine": {"fingerprint": "abc", "cores": 8},
    "model": "tiny",
    "versions": {"torch": "2.13.0"},
    "prompt_tokens": 8,
    "new_tokens": 4,
    "prefill_tokens_per_s": 100.5,
    "decode_tokens_per_s": 9.25,
    "distortions": ["kernel NUMA balancing is on"],
    "strict": True,
}


def test_both_phases_are_measured():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small.DENSE), dtype=torch.float32).eval()
    found = bench_command.measure(model, prompt_tokens=8, new_tokens=4, repeat=1)
    assert found["prefill_tokens_per_s"] > 0 and found["decode_tokens_per_s"] > 0


def test_the_facts_of_a_machine_do_not_name_it():
    import socket

    facts = bench_command.machine_facts(Platform.detect())
    assert facts["cores"] >= 1 and facts["fingerprint"] and socket.gethostname() not in str(facts.values())


def test_a_measurement_is_added_to_the_manifest(tmp_path):
    rules = tmp_path / "mine.yaml"
    rules.write_text("schema: 1\nextends: auto\n")
    path = bench_command.manifest_path(str(rules))
    assert path == tmp_path / "mine.manifest.yaml"
    bench_command.write_validation(path, RESULT)
    bench_command.write_validation(path, {**RESULT, "decode_tokens_per_s": 10})
    found = read_manifest(path.read_text(), file="x")
    assert found["status"] == "measured"
    assert [entry["decode_tokens_per_s"] for entry in found["validated_on"]] == [9.25, 10]
    assert found["validated_on"][0] == RESULT


def test_a_wrong_manifest_stays_as_it_is(tmp_path):
    path = tmp_path / "mine.manifest.yaml"
    path.write_text("schema: 1\nstatus: great\n")
    with pytest.raises(RuleError, match="great"):
        bench_command.write_validation(path, RESULT)
    assert path.read_text() == "schema: 1\nstatus: great\n"


def test_a_preset_is_not_written_to():
    with pytest.raises(ConfigurationError, match="a rule file of your own"):
        bench_command.manifest_path("family/generic")


@pytest.mark.slow
def test_the_real_model_is_measured_and_its_figures_shared(smollm2_gguf, tmp_path):
    """bench --share --json in a process of its own; what it wrote is read back by `rules show` and `rules list`."""
    presets = tmp_path / "mine"
    presets.mkdir()
    (presets / "dense.yaml").write_text("schema: 1\ndescription: d\nextends: auto\nvars: {format: int4}\n")

    def numagraft(*arguments: str, code: int = 0) -> str:
        environment = {**os.environ, "NUMAGRAFT_RULES_PATH": str(presets), "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-m", "numagraft", *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    asked = ("--prompt-tokens", "32", "--new-tokens", "4", "--repeat", "1")
    bench = ("bench", str(smollm2_gguf), "--rules", str(presets / "dense.yaml"), *asked)
    found = json.loads(numagraft(*bench, "--share", "--json").splitlines()[-1])
    assert found["model"] == smollm2_gguf.name and (found["prompt_tokens"], found["new_tokens"]) == (32, 4)
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0 and found["strict"] is True
    assert found["machine"]["cores"] >= 1 and set(found["versions"]) == {"numagraft", "torch", "transformers"}
    assert isinstance(found["distortions"], list)
    assert found["distortions"] == bench_command.distortions(Platform.detect()) or any(
        "load average" in text for text in found["distortions"]
    )
    assert str(tmp_path) not in json.dumps(found), "what is shared names no place on this machine"

    shown = json.loads(numagraft("rules", "show", "mine/dense", "--json"))
    assert shown["manifest"]["status"] == "measured" and shown["manifest"]["validated_on"] == [found]
    text = numagraft("rules", "show", "mine/dense")
    assert f"decode {found['decode_tokens_per_s']:,.1f} tokens/s (4 tokens)" in text
    assert any(
        row["name"] == "mine/dense" and row["status"] == "measured"
        for row in json.loads(numagraft("rules", "list", "--json"))
    )
    numagraft("rules", "validate", str(presets))
    numagraft(*bench, "--share", "--set", "vars.format=int8", code=2)
    assert json.loads(numagraft("rules", "show", "mine/dense", "--json"))["manifest"]["validated_on"] == [found]
