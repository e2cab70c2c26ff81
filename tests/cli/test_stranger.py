"""A stranger's first ten minutes, in a fresh directory: init, edit, lint, plan, run, pack, install elsewhere, run again.

NUMAGRAFT_PYTHON names another interpreter to do it with (that of an environment with the installed wheel), and
NUMAGRAFT_OTHER_PYTHON the one of the environment elsewhere: `make wheel-test` gives both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PYTHON = os.environ.get("NUMAGRAFT_PYTHON", sys.executable)
OTHER = os.environ.get("NUMAGRAFT_OTHER_PYTHON", PYTHON)
MANIFEST = "schema: 1\nstatus: planned, not measured\nmemory: 0.63 bytes per weight\nfirmware: none\nvalidated_on: []\n"


def numagraft(*arguments: str, cwd, home, python: str = PYTHON, code: int = 0) -> str:
    environment = {**os.environ, "NUMAGRAFT_RULES_HOME": str(home), "COLUMNS": "160"}
    done = subprocess.run(
        [python, "-m", "numagraft", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_nothing_to_a_shared_preset(tmp_path, smollm2_gguf):
    model = str(smollm2_gguf)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    own = {"cwd": mine, "home": mine / "home"}
    other = {"cwd": theirs, "home": theirs / "home", "python": OTHER}
    for python in {PYTHON, OTHER} - {sys.executable}:
        where = "import numagraft, sys; print(numagraft.__file__.startswith(sys.prefix))"
        found = subprocess.run([python, "-c", where], cwd=mine, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "True", "the wheel is not what is tested"

    numagraft("init", model, **own)
    rules = mine / "rules.yaml"
    text = rules.read_text().replace("format: int8     ", "format: int4     ")
    assert "  format: int4" in text
    rules.write_text(
        text.replace("# rules:", "rules:\n  - id: q\n    match: {name: 'q_proj'}\n    replace: {class: linear}\n# ")
    )
    wrong = numagraft("lint", "rules.yaml", "-m", model, **own, code=1)
    assert "names are matched whole, add '.*'" in wrong
    rules.write_text(text)
    assert "0 errors" in numagraft("lint", "rules.yaml", "-m", model, "--strict", **own)
    planned = json.loads(numagraft("plan", model, "-r", "rules.yaml", "--json", **own))
    assert {module["format"] for module in planned["modules"]} == {"int4 g32 asymmetric", "int8"}
    prompt = ("--prompt", "The capital of France is", "--max-new-tokens", "4", "--json")
    first = json.loads(numagraft("run", model, "-r", "rules.yaml", *prompt, **own).splitlines()[-1])
    numagraft("plan", model, "-r", "rules.yaml", "-o", "plan.json", **own)
    as_planned = json.loads(numagraft("run", model, "--plan", "plan.json", *prompt, **own).splitlines()[-1])
    assert as_planned["text"] == first["text"] and as_planned["placement"]["ok"]
    edited = (mine / "plan.json").read_text().replace('"threads": ', '"threads": 1')
    (mine / "plan.json").write_text(edited)
    numagraft("run", model, "--plan", "plan.json", *prompt, **own, code=2)

    folder = mine / "shared"
    folder.mkdir()
    (folder / "small.yaml").write_text(text)
    (folder / "small.manifest.yaml").write_text(MANIFEST)
    numagraft("rules", "validate", "shared", **own)
    numagraft("rules", "pack", "shared", "-o", str(theirs / "shared.tar.gz"), **own)

    numagraft("rules", "add", "shared.tar.gz", **other)
    assert "shared/small" in numagraft("rules", "list", **other)
    second = json.loads(numagraft("run", model, "-r", "shared/small", *prompt, **other).splitlines()[-1])
    assert second["text"] == first["text"]
