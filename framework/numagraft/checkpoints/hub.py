"""Models on the Hugging Face hub: the files that loading needs, downloaded once into the hub's own cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from numagraft.errors import CheckpointError

#: what a checkpoint consists of here; never pickled weights, and code only when it is trusted
_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubOptions:
    """How to find a model on the hub; the names are those of `from_pretrained`."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    gguf_file: str | None = None
    trust_code: bool = False


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` reads as organisation/name rather than as a path."""
    return bool(_HUB_ID.fullmatch(text)) and not text.endswith(".gguf")


def snapshot(repository: str, options: HubOptions) -> Path:
    """The local directory (or GGUF file) of a hub repository, complete at one revision.

    Raises CheckpointError when it does not exist, is gated, or is neither cached nor reachable.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = {
        "revision": options.revision,
        "token": options.token,
        "cache_dir": options.cache_dir,
        "local_files_only": options.local_files_only,
    }
    named = f"{repository}@{options.revision}" if options.revision else repository
    try:
        if options.gguf_file:
            return Path(huggingface_hub.hf_hub_download(repository, options.gguf_file, **where))
        patterns = [*_PATTERNS, *(["*.py"] if options.trust_code else [])]
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **where))
    except GatedRepoError as error:
        raise CheckpointError(f"{named} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {options.revision!r}; check the name") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is neither a directory nor a hub repository named {repository}; check the spelling, or run "
            "`hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{named} is not complete in the local hub cache and the hub cannot be reached; connect once, or give a local "
            "directory"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{named} cannot be fetched from the hub: {' '.join(str(error).split())}") from error
