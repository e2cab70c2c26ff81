"""Every expert class of the installed transformers, built small from its family's own configuration."""

from __future__ import annotations

import importlib
import inspect
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn

_MODELS = Path(transformers.__file__).parent / "models"
_CLASS = re.compile(r"^class (\w*Experts?(?:GLU)?)\(", re.MULTILINE)


@cache
def expert_classes() -> dict[str, type[nn.Module]]:
    """Class name -> class, for every `*Experts` defined in a modeling file (not shared experts, which are plain MLPs)."""
    found = {}
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        names = [name for name in _CLASS.findall(path.read_text()) if "Shared" not in name or name == "GraniteMoeSharedExperts"]
        if names:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found |= {name: getattr(module, name) for name in names}
    return found


def configurations(cls: type[nn.Module]) -> list[type[transformers.PreTrainedConfig]]:
    """The family's configuration classes, text ones first."""
    package, _, stem = cls.__module__.rpartition(".")
    module = importlib.import_module(f"{package}.{stem.replace('modeling_', 'configuration_')}")
    configs = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedConfig)
        and value.__module__ == module.__name__
    ]
    talker = "Talker" in cls.__name__
    return sorted(configs, key=lambda config: (("Talker" in config.__name__) != talker, "Text" not in config.__name__))


# the names under which families keep their sizes; small and odd, so that nothing divides by a tile
EXPERTS, HIDDEN, INTERMEDIATE = 5, 72, 40
_SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"), INTERMEDIATE),
    **dict.fromkeys(("d_ff", "expert_ffn_dim"), INTERMEDIATE),
}


def build(cls: type[nn.Module], device: str = "meta") -> nn.Module | None:
    """The class with small sizes; None when no configuration of the family fits it. Weights are left uninitialised."""
    if cls.__name__ == "JetMoeParallelExperts":
        return cls(EXPERTS, HIDDEN, INTERMEDIATE)
    for config_class in configurations(cls):
        try:
            config = config_class()
        except Exception:
            continue
        for name, size in _SIZES.items():
            with suppress(Exception):
                setattr(config, name, size)
        for args in ((config,), (config, INTERMEDIATE)):
            try:
                with torch.device(device):
                    return cls(*args)
            except Exception:
                continue
    return None
