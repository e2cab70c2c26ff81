"""From what a person names (a directory, a GGUF file, a hub id) to a checkpoint and its tokenizer."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numagraft.checkpoints import quantised
from numagraft.checkpoints.gguf import GgufCheckpoint
from numagraft.checkpoints.hub import HubOptions, looks_like_hub_id, snapshot
from numagraft.checkpoints.mapping import Checkpoint
from numagraft.checkpoints.safetensors import SafetensorsCheckpoint
from numagraft.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def resolve(source: str | Path, *, hub: HubOptions | None = None) -> Path:
    """The local directory or GGUF file that `source` means; a hub id is downloaded (or found in the cache) first.

    Raises CheckpointError when there is nothing there.
    """
    path = Path(source).expanduser()
    if path.exists():
        if hub is not None and hub.gguf_file and path.is_dir():
            path = path / hub.gguf_file
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist; gguf_file names a file of the directory")
        return path
    if looks_like_hub_id(str(source)):
        return snapshot(str(source), hub or HubOptions())
    raise CheckpointError(
        f"{source} does not exist: give a directory with config.json and safetensors files, a .gguf file, or a hub id "
        "such as organisation/name"
    )


def open_checkpoint(
    source: str | Path,
    *,
    trust_code: bool = False,
    hub: HubOptions | None = None,
    config: PreTrainedConfig | None = None,
) -> Checkpoint:
    """Opens a checkpoint: headers and configuration are read and checked, no weights.

    Raises CheckpointError for a checkpoint that is missing, damaged, or quantised by others.
    """
    path = resolve(source, hub=hub)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is one file of a checkpoint; give its directory, {path.parent}")
        checkpoint: Checkpoint = GgufCheckpoint(path)
        if config is not None:
            checkpoint.config = config
        return checkpoint
    config = config if config is not None else read_config(path, trust_code=trust_code)
    quantisation = quantised.quantisation_of(config)
    if quantisation is None:
        return SafetensorsCheckpoint(path, config)
    if quantisation["quant_method"] not in quantised.METHODS:
        refuse_quantized(config, str(source))
    config = deepcopy(config)
    quantised.without_quantisation(config)
    checkpoint = SafetensorsCheckpoint(path, config)
    checkpoint.join_quantised(quantisation)
    return checkpoint


def read_config(directory: Path, *, trust_code: bool) -> PreTrainedConfig:
    """config.json of a directory; code from the checkpoint runs only with `trust_code`."""
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        gguf = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f"it holds GGUF files: give one of them ({', '.join(gguf[:3])})" if gguf else "give a model's directory"
        raise CheckpointError(f"{directory} has no config.json; {hint}")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_code, local_files_only=True)
    except Exception as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise CheckpointError(
                f"{directory} needs Python code of its own; read it, then pass trust_code=True to run it"
            ) from None
        raise CheckpointError(f"{directory / 'config.json'} cannot be used: {text}") from error


def refuse_quantized(config: Any, source: str) -> None:
    """Raises CheckpointError where the weights are quantised by somebody else's method."""
    found = quantised.quantisation_of(config)
    if found is not None:
        raise CheckpointError(
            f"{source} is already quantised ({found['quant_method'] or 'by an unnamed method'}), which numagraft cannot take "
            "over: give the unquantised bf16 or fp16 checkpoint of this model, or one in fp8 or mxfp4 from a directory"
        )


def load_tokenizer(
    source: str | Path, *, trust_code: bool = False, hub: HubOptions | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a directory, a GGUF file (from its own metadata) or a hub id.

    Raises CheckpointError when there is none.
    """
    from transformers import AutoTokenizer

    path = resolve(source, hub=hub)
    options: dict[str, Any] = {"local_files_only": True}
    if path.is_file():
        options["gguf_file"] = path.name
    try:
        directory = path.parent if path.is_file() else path
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_code, **options)
    except Exception as error:
        raise CheckpointError(
            f"{path} has no usable tokenizer ({type(error).__name__}: {' '.join(str(error).split())}); "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
