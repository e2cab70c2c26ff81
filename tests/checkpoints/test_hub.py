"""Hub ids, against a local cache laid out as the hub's client lays it out; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from numagraft.checkpoints import open_checkpoint
from numagraft.checkpoints.hub import HubOptions, looks_like_hub_id
from numagraft.errors import CheckpointError
from tests import models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    repository = tmp_path / "models--organisation--small"
    models.save(models.build(models.llama()), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_cached_model(cache: Path) -> None:
    hub = HubOptions(cache_dir=str(cache), local_files_only=True)
    with open_checkpoint("organisation/small", hub=hub) as source:
        assert set(source) == set(models.build(models.llama()).state_dict())


def test_a_model_that_is_not_there(cache: Path) -> None:
    hub = HubOptions(cache_dir=str(cache), local_files_only=True)
    with pytest.raises(CheckpointError, match="not complete in the local hub cache"):
        open_checkpoint("organisation/other", hub=hub)
    with pytest.raises(CheckpointError, match=r"organisation/small@v2"):
        open_checkpoint(
            "organisation/small", hub=HubOptions(cache_dir=str(cache), local_files_only=True, revision="v2")
        )


@pytest.mark.parametrize(
    "text, is_one", [("a/b", True), ("a/b.gguf", False), ("a", False), ("/a/b", False), ("../b", False)]
)
def test_what_looks_like_a_hub_id(text: str, is_one: bool) -> None:
    assert looks_like_hub_id(text) is is_one
