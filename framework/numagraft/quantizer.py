"""`GraftConfig`, and the quantizer through which transformers' own loader calls numagraft.

Importing this module registers both, so that `from_pretrained(path, quantization_config=GraftConfig(...))` works by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from numagraft.errors import CheckpointError, ConfigurationError
from numagraft.loading import Load, Take, plan_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps, WeightTransform

METHOD = "numagraft"

# The configuration is copied and written to JSON by transformers, so a load that is under way cannot travel in it.
_ACTIVE: ContextVar[Load | None] = ContextVar("numagraft_load", default=None)


class GraftConfig(QuantizationConfigMixin):
    """Asks `from_pretrained` to graft: plain JSON data.

    `rules` is a rule file, a preset's name, "auto", or a rule file's data; `overrides` are "vars.format=int8" strings.
    """

    def __init__(
        self,
        rules: str | Mapping[str, Any] = "auto",
        overrides: Sequence[str] = (),
        trust_code: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ConfigurationError(
                f"GraftConfig does not know {', '.join(sorted(kwargs))}; it takes rules, overrides and trust_code"
            )
        self.quant_method = METHOD
        self.rules = str(rules) if isinstance(rules, Path) else rules
        self.overrides = list(overrides)
        self.trust_code = trust_code


class GraftQuantizer(HfQuantizer):
    """Called by the loader of transformers; does everything through a `Load`."""

    requires_calibration = False

    def __init__(self, quantization_config: GraftConfig, **kwargs: Any) -> None:
        if kwargs.get("pre_quantized"):
            raise CheckpointError(
                "this configuration says that the checkpoint is packed by numagraft, but packed weights cannot be saved yet: "
                "remove quantization_config from its config.json"
            )
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # only then does the loader convert one parameter at a time
        self._load = _ACTIVE.get()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        refuse_device_map(device_map)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self._load is None:
            config: GraftConfig = self.quantization_config
            plan = plan_model(model, config.rules, overrides=config.overrides, trust_code=config.trust_code)
            self._load = Load(plan, files=[Path(file) for file in checkpoint_files or ()])
        self._load.graft(model)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        return self._load.conversions(weight_conversions, model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._load.intercepts(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return Take(self._load)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = self._load.finish(model)
        self._load = None
        return model

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def refuse_device_map(device_map: Any) -> None:
    if device_map is not None:
        raise ConfigurationError(
            f"device_map={device_map!r} is not supported: with numagraft, rules say where modules go; write "
            "'replace: {class: default, device: cuda:0}' (or class: torch) in the rule file instead"
        )


@contextmanager
def active(load: Load) -> Iterator[None]:
    """Makes `load` the one that quantizers created inside take part in."""
    token = _ACTIVE.set(load)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def register() -> None:
    """Makes transformers know the method; doing it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, GraftConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, GraftQuantizer)


register()
