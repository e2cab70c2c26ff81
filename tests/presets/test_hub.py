"""Presets from a repository on the Hub, over HTTP on localhost: pinned, data only, cached, and noticed when they change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .fake_hub import Hub, etag, serving

FIRST, SECOND, GONE = "a" * 40, "b" * 40, "c" * 40
MANIFEST = b"schema: 1\nstatus: planned, not measured\nmemory: m\nfirmware: f\nvalidated_on: []\n"
RULES = b"schema: 1\ndescription: d\nextends: family/generic\nvars: {format: int4}\n"


@pytest.fixture
def hub():
    files = {
        "fast.yaml": RULES,
        "fast.manifest.yaml": MANIFEST,
        "README.md": b"# hello",
        "setup.py": b"raise SystemExit",
    }
    repository = Hub(
        "someone/presets",
        {FIRST: files, SECOND: {**files, "fast.yaml": RULES.replace(b"int4", b"int8")}},
        {"main": SECOND, "v1": FIRST},
    )
    with serving(repository) as serving_hub:
        yield serving_hub


def rules(
    hub: Hub, home: Path, *arguments: str, cache: str = "hub", **environment: str
) -> subprocess.CompletedProcess[str]:
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NUMAGRAFT_RULES_HOME": str(home / "rules"),
    }
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-m", "numagraft", "rules", *arguments],
        env={**clean, **own, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def lock(home: Path) -> dict:
    return json.loads((home / "rules" / "numagraft-rules.lock").read_text())["sources"]


def test_a_commit_is_downloaded_recorded_and_used(hub, tmp_path):
    done = rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("added presets/fast (sha256 ")
    assert lock(tmp_path)["presets"]["revision"] == FIRST
    asked = [request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request]
    assert set(asked) == {"fast.yaml", "fast.manifest.yaml"}, "only presets are downloaded"
    blobs = {path.name for path in (tmp_path / "hub").rglob("blobs/*")}
    assert blobs == {etag(RULES), etag(MANIFEST)}, "the cache goes by etag"
    shown = rules(hub, tmp_path, "show", "presets/fast")
    assert shown.returncode == 0 and "int4" in shown.stdout


def test_what_is_cached_is_added_without_a_network(hub, tmp_path):
    assert rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}").returncode == 0
    asked = len(hub.requests)
    again = rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}", "--replace", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(hub.requests) == asked
    cold = rules(hub, tmp_path, "add", f"hf:someone/presets@{SECOND}", "--name", "x", HF_HUB_OFFLINE="1")
    assert cold.returncode == 2 and "cannot be had" in cold.stderr and "Traceback" not in cold.stderr
    assert sorted(lock(tmp_path)) == ["presets"]


@pytest.mark.parametrize(("given", "commit"), [("", SECOND), ("@main", SECOND), ("@v1", FIRST)])
def test_a_branch_is_refused_with_the_commit_that_it_is_now(hub, tmp_path, given, commit):
    done = rules(hub, tmp_path, "add", f"hf:someone/presets{given}")
    assert done.returncode == 2
    assert "names no commit" in done.stderr and f"hf:someone/presets@{commit}" in done.stderr
    assert not (tmp_path / "rules").exists()


@pytest.mark.parametrize("origin", [f"hf:someone/presets@{GONE}", f"hf:nobody/nothing@{FIRST}", "hf:nobody/nothing"])
def test_what_is_not_there_or_was_revoked(hub, tmp_path, origin):
    done = rules(hub, tmp_path, "add", origin)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be had" in done.stderr or "names no commit" in done.stderr
    assert not (tmp_path / "rules").exists()


def test_a_revoked_commit_stays_usable_where_it_was_added(hub, tmp_path):
    assert rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}").returncode == 0
    del hub.commits[FIRST]
    assert rules(hub, tmp_path, "show", "presets/fast").returncode == 0
    fresh = rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}", "--replace", cache="fresh")
    assert fresh.returncode == 2 and "cannot be had" in fresh.stderr
    assert rules(hub, tmp_path, "show", "presets/fast").returncode == 0


def test_a_commit_whose_contents_changed_is_reported(hub, tmp_path):
    assert rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}").returncode == 0
    recorded = lock(tmp_path)
    hub.commits[FIRST] = {**hub.commits[FIRST], "fast.yaml": RULES.replace(b"int4", b"bf16")}
    done = rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}", "--replace", cache="fresh")
    assert done.returncode == 2
    assert "is not what it was when it was added" in done.stderr and "numagraft-rules.lock" in done.stderr
    assert lock(tmp_path) == recorded
    newer = rules(hub, tmp_path, "add", f"hf:someone/presets@{SECOND}", "--replace")
    assert newer.returncode == 0 and "its contents changed: they were sha256" in newer.stdout


def test_a_file_changed_on_disk_is_reported(hub, tmp_path):
    assert rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}").returncode == 0
    (tmp_path / "rules" / "presets" / "fast.yaml").write_bytes(RULES.replace(b"int4", b"bf16"))
    done = rules(hub, tmp_path, "show", "presets/fast")
    assert done.returncode == 2 and "were changed since they were added" in done.stderr


def test_a_bad_repository_leaves_nothing(hub, tmp_path):
    hub.commits[FIRST] = {"fast.yaml": RULES + b"nonsense: 1\n", "fast.manifest.yaml": MANIFEST}
    done = rules(hub, tmp_path, "add", f"hf:someone/presets@{FIRST}")
    assert done.returncode == 2 and "nonsense" in done.stderr
    assert not (tmp_path / "rules").exists()
