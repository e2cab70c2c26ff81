"""A model without weights: every parameter on the meta device, made from a configuration alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from numagraft.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from numagraft.checkpoints import Checkpoint


def build(config_or_path: Any, *, dtype: torch.dtype | None = None, trust_code: bool = False) -> nn.Module:
    """The causal language model of a transformers config, on meta, in evaluation mode.

    Takes a config object, a directory with config.json, a config.json, a GGUF file or a hub id; a model is returned as it
    is. `dtype` defaults to the config's own, else bfloat16. Reads no weights.

    Raises CheckpointError when there is no config, or transformers has no causal language model for it.
    """
    if isinstance(config_or_path, nn.Module):
        return config_or_path
    config = config_or_path
    if isinstance(config_or_path, str | os.PathLike):
        config = load_config(config_or_path, trust_code=trust_code)
    return build_class(model_class(config, trust_code=trust_code), config, dtype=dtype)


def build_for(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, trust_code: bool = False) -> nn.Module:
    """The model of an open checkpoint on meta; parameters that it stores quantised say so (`numagraft_coding`)."""
    model = build(checkpoint.config, dtype=dtype or checkpoint.dtype, trust_code=trust_code)
    if any(hasattr(tensor, "coding") for tensor in checkpoint.values()):
        from transformers.conversion_mapping import get_model_conversion_mapping

        from numagraft.preflight import map_names

        targets, _ = map_names(checkpoint, get_model_conversion_mapping(model), model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, target in targets.items():
            codings = {getattr(tensor, "coding", None) for tensors in target.sources.values() for tensor in tensors}
            if len(codings) == 1 and None not in codings and name in parameters:
                parameters[name].numagraft_coding = codings.pop()
    return model


def build_class(cls: type[nn.Module], config: Any, *, dtype: torch.dtype | None = None) -> nn.Module:
    """`cls(config)` on meta in `dtype`."""
    text = (getattr(type(config), "sub_configs", None) or {}).get("text_config")
    if text is not None and getattr(cls, "config_class", None) is text:
        config = config.get_text_config()  # as from_pretrained does: the class is that of the language model alone
    chosen = dtype or _dtype(config) or torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(chosen)
    try:
        with torch.device("meta"):
            model = _without_init(cls, config)
            if hasattr(model, "tie_weights"):
                model.tie_weights()
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _without_init(cls: type[nn.Module], config: Any) -> nn.Module:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return cls(config)


def _dtype(config: Any) -> torch.dtype | None:
    for owner in (config, getattr(config, "text_config", None)):
        value = getattr(owner, "dtype", None)
        if isinstance(value, str):
            value = getattr(torch, value.removeprefix("torch."), None)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return value if value.itemsize > 1 else torch.bfloat16
    return None


def model_class(config: Any, *, trust_code: bool = False) -> type[nn.Module]:
    """The concrete class that AutoModelForCausalLM maps `config` to; the checkpoint's own code only with `trust_code`.

    Raises CheckpointError without one.
    """
    from transformers import AutoModelForCausalLM

    remote = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in remote and type(config) not in AutoModelForCausalLM._model_mapping:
        if not trust_code:
            raise CheckpointError(
                "the model needs Python code of its own", [Problem("", "read it, then pass trust_code=True to run it")]
            )
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote["AutoModelForCausalLM"], config._name_or_path)

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        if not isinstance(found, list | tuple):
            return found
        wanted = getattr(config, "architectures", None) or []
        return next((cls for cls in found if cls.__name__ in wanted), found[0])
    raise CheckpointError(
        f"transformers has no causal language model for {type(config).__name__}",
        [Problem("", f"model_type {getattr(config, 'model_type', '?')!r}", "only models that generate text can be grafted")],
    )


def load_config(path: str | os.PathLike[str], *, trust_code: bool = False) -> Any:
    """The transformers config of a directory, a config.json, a GGUF file or a hub id; no weights are read.

    Raises CheckpointError when there is none.
    """
    from transformers import AutoConfig

    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        return _gguf_config(local)
    if local.is_dir() and not (local / "config.json").is_file():
        raise CheckpointError(f"{local} holds no config.json", [Problem(str(local), "is this a model's directory?")])
    if not local.exists() and (local.is_absolute() or str(path).startswith(".") or str(path).count("/") > 1):
        raise CheckpointError(f"{path} does not exist", [Problem("", "give a directory, a GGUF file or a hub id")])
    try:
        return AutoConfig.from_pretrained(
            local if local.exists() else os.fspath(path), trust_remote_code=trust_code or None
        )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no usable config for {path}", [Problem(str(path), first)]) from error


def _gguf_config(path: Path) -> Any:
    from numagraft.checkpoints import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return checkpoint.config
