"""Presets are checked, packed, added, found, noticed when changed, and removed."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from numagraft import presets, sharing
from numagraft.errors import ConfigurationError, RuleError
from numagraft.platform import Platform
from numagraft.rulefile import load_rules

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "preset-package" / "numagraft_presets_example"
ONE = Platform.virtual(1)
MANIFEST = "schema: 1\nstatus: planned, not measured\nmemory: m\nfirmware: f\nvalidated_on: []\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(presets.HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def folder(tmp_path, **files: str) -> Path:
    made = tmp_path / "mine"
    made.mkdir(exist_ok=True)
    for name, text in files.items():
        (made / name.replace("__", ".")).write_text(text)
    return made


def good(tmp_path) -> Path:
    text = "schema: 1\ndescription: d\nextends: family/generic\nvars: {format: int4}\n"
    return folder(tmp_path, a__yaml=text, a__manifest__yaml=MANIFEST)


def test_a_pack_travels(tmp_path):
    pack = tmp_path / "mine.tar.gz"
    first = sharing.pack(good(tmp_path), pack)
    bytes_ = pack.read_bytes()
    assert sharing.pack(good(tmp_path), pack) == first and pack.read_bytes() == bytes_
    added = sharing.add(str(pack))
    assert added.presets == ("mine/a",) and added.sha256 == first
    assert load_rules("mine/a", platform=ONE).vars["format"] == "int4"
    assert presets.find("mine/a").manifest()["memory"] == "m"
    with pytest.raises(ConfigurationError, match="is there already"):
        sharing.add(str(pack))
    sharing.add(str(pack), replace=True)
    sharing.remove("mine")
    assert presets.find("mine/a") is None
    with pytest.raises(ConfigurationError, match="added: none"):
        sharing.remove("mine")


def test_a_change_after_adding_is_refused(tmp_path, home):
    sharing.add(str(good(tmp_path)))
    path = home / "mine" / "a.yaml"
    path.write_text(path.read_text().replace("int4", "bf16"))
    with pytest.raises(RuleError, match=r"changed since they were added.*\n.*sha256.*\n.*rules add .* --replace"):
        load_rules("mine/a", platform=ONE)
    sharing.add(str(good(tmp_path)), replace=True)
    load_rules("mine/a", platform=ONE)
    (home / "mine" / "b.yaml").write_text("schema: 1\n")
    with pytest.raises(RuleError, match="changed since"):
        load_rules("mine/a", platform=ONE)


def test_a_folder_that_nobody_added_is_refused(tmp_path, home):
    (home / "sneaked").mkdir(parents=True)
    (home / "sneaked" / "a.yaml").write_text("schema: 1\nextends: family/generic\n")
    with pytest.raises(RuleError, match="not in the lock file"):
        load_rules("sneaked/a", platform=ONE)


def test_what_is_wrong_is_found_before_anything_is_written(tmp_path, home):
    made = folder(
        tmp_path,
        code__yaml="schema: 1\nrules:\n  - match: {role: linear}\n    replace: {class: os.system}\n",
        code__manifest__yaml=MANIFEST,
        wrong__yaml="schema: 1\nrulez: []\n",
        bad__yaml="schema: 1\nextends: family/generic\n",
        bad__manifest__yaml=MANIFEST.replace("planned, not measured", "measured"),
        run__py="print()",
    )
    (made / "link.yaml").symlink_to("/etc/passwd")
    text = "\n".join(map(str, sharing.validate(made)))
    assert "run.py: does not belong to a preset" in text and "link.yaml: is a link" in text
    (made / "run.py").unlink()
    (made / "link.yaml").unlink()
    text = "\n".join(map(str, sharing.validate(made)))
    for piece in (
        "code.yaml:3:5: the dotted class 'os.system'",
        "wrong.yaml:2:1: unknown key 'rulez'",
        "wrong.yaml: has no manifest",
        "status is measured, but validated_on is empty",
    ):
        assert piece in text
    with pytest.raises(ConfigurationError, match="cannot be added"):
        sharing.add(str(made))
    with pytest.raises(ConfigurationError, match="cannot be packed"):
        sharing.pack(made, tmp_path / "x.tar.gz")
    assert not home.exists()


@pytest.mark.parametrize("kind", ["traversal", "link", "large", "text", "truncated"])
def test_hostile_packs(tmp_path, home, kind):
    path = tmp_path / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        if kind == "traversal":
            for name in ("../../a.yaml", "../../a.manifest.yaml"):
                info = tarfile.TarInfo(name)
                info.size = len(MANIFEST)
                archive.addfile(info, io.BytesIO(MANIFEST.encode()))
        elif kind == "link":
            info = tarfile.TarInfo("a.yaml")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
        elif kind == "large":
            info = tarfile.TarInfo("a.yaml")
            info.size = 200 << 20
            archive.addfile(info, io.BytesIO(bytes(200 << 20)))
        else:
            info = tarfile.TarInfo("a.yaml")
            info.size = 10
            archive.addfile(info, io.BytesIO(b"schema: 1\n"))
    if kind == "text":
        path.write_text("hello")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigurationError):
        sharing.add(str(path), name="evil")
    assert not home.exists()


def test_names_that_would_take_ours(tmp_path):
    for name in ("platform", "family", "auto", "../x", ""):
        with pytest.raises(ConfigurationError, match=r"cannot name a source|is no pack"):
            sharing.add(str(good(tmp_path)), name=name or "/")


def test_a_hub_repository_is_pinned_and_comes_from_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="names no commit"):
        sharing.add("hf:someone/presets")
    with pytest.raises(ConfigurationError, match="names no commit"):
        sharing.add("hf:someone/presets@main")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    repository = cache / "models--someone--presets"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    source = good(tmp_path)
    for index, name in enumerate(("a.yaml", "a.manifest.yaml")):
        blob = repository / "blobs" / f"{index:040x}"
        blob.write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    added = sharing.add(f"hf:someone/presets@{commit}")
    assert (added.revision, added.presets) == (commit, ("presets/a",))
    assert load_rules("presets/a", platform=ONE).vars["format"] == "int4"
    assert json.loads((presets.home() / sharing.LOCK).read_text())["sources"]["presets"]["revision"] == commit


def test_a_package_is_found_through_its_entry_point_and_never_imported(tmp_path, monkeypatch):
    site = tmp_path / "site"
    package = site / "numagraft_presets_example"
    package.mkdir(parents=True)
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (package / path.name).write_bytes(path.read_bytes())
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = site / "numagraft_presets_example-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numagraft-presets-example\nVersion: 1.0.0\n")
    (info / "entry_points.txt").write_text("[numagraft.rules]\nexample = numagraft_presets_example\n")
    monkeypatch.syspath_prepend(str(site))
    assert presets.find("example/small-and-exact").source.kind == "package"
    rules = load_rules("example/small-and-exact", platform=ONE)
    assert [rule.id for rule in rules.rules] == ["first-layers", "experts", "lm_head", "linear"]
    assert "numagraft_presets_example" not in sys.modules


def test_the_example_package_is_valid():
    assert sharing.validate(EXAMPLE) == []
