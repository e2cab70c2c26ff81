"""The three calls: `plan`, `load_and_optimize`, `optimize`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from numagraft.checkpoints import Checkpoint, open_checkpoint
from numagraft.checkpoints.hub import HubOptions
from numagraft.checkpoints.memory import refuse_unfit, skeleton_of
from numagraft.errors import ConfigurationError, NumagraftError
from numagraft.loading import Load, plan_model
from numagraft.progress import Progress, shown, transformers_bar_hidden
from numagraft.quantizer import METHOD, GraftConfig, active, refuse_device_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from numagraft.planning import Plan
    from numagraft.platform import Platform
    from numagraft.rulefile.rules import RuleSet
    from numagraft.runtime import RuntimeLayout

    Source = str | Path | PreTrainedModel
    Rules = str | Path | Mapping[str, Any] | RuleSet

_HUB_KWARGS = frozenset(field.name for field in fields(HubOptions)) - {"trust_code"}


def plan(
    model_or_path: Source,
    rules: Rules = "auto",
    *,
    overrides: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    platform: Platform | None = None,
    runtime: RuntimeLayout | None = None,
    trust_code: bool = False,
    check_fit: bool = True,
    **model_kwargs: Any,
) -> Plan:
    """What `load_and_optimize` would do with the same arguments; no weight is read and nothing is changed.

    Raises RuleError, PlanError or CheckpointError with every problem.
    """
    options = {
        "overrides": overrides,
        "platform": platform,
        "runtime": runtime,
        "trust_code": trust_code,
        "check_fit": check_fit,
    }
    if not isinstance(model_or_path, (str, Path)):
        refuse_unfit(model_or_path)
        return plan_model(skeleton_of(model_or_path), rules, **options)
    hub, model_kwargs = _split_hub(model_kwargs, trust_code)
    with open_checkpoint(
        model_or_path, trust_code=trust_code, hub=hub, config=model_kwargs.pop("config", None)
    ) as source:
        skeleton = _build_skeleton(source, _dtype_of(dtype, source), trust_code, model_kwargs)
        return plan_model(skeleton, rules, **options)


def load_and_optimize(
    model_or_path: Source,
    rules: Rules = "auto",
    *,
    overrides: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    platform: Platform | None = None,
    runtime: RuntimeLayout | None = None,
    trust_code: bool = False,
    progress: Progress | bool | None = None,
    on_plan: Callable[[Plan], Any] | None = None,
    allow_unexpected: Sequence[str] = (),
    plan: Plan | str | Path | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """An ordinary transformers model whose modules are replaced as `rules` say, with its placement proven.

    `model_or_path` is a directory (config.json and safetensors), a GGUF file, a hub id, or a PreTrainedModel in memory,
    whose weights are then taken out of it one by one. `dtype` is that of everything that is not packed (None: the
    checkpoint's own). `progress` is called as `progress(bytes done, bytes in all, name)`; True draws a bar. `on_plan` gets
    the plan before any weight is read. Names matching a regex of `allow_unexpected` may be in the checkpoint without having
    a place in the model. `model_kwargs` go to the model (`attn_implementation=...`) and to the hub (`revision`, `token`,
    `cache_dir`, `local_files_only`, `gguf_file`).

    `plan` is a Plan, or the file of one (`numagraft plan -o`), that is carried out as it is in place of rules, in its dtype;
    where it does not hold for this model, machine or version, that is a PlanError naming everything that differs.

    The model has `numagraft_plan` and `placement_report()`, which asks the kernel again at any time.

    Raises RuleError and PlanError before anything is read, CheckpointError and WeightError where the checkpoint does not
    fit, PlacementError where memory is not where it should be; nothing stays behind then.
    """
    saved = _saved(plan, rules, overrides, trust_code)
    options = {"overrides": overrides, "platform": platform, "runtime": runtime, "trust_code": trust_code}
    if not isinstance(model_or_path, (str, Path)):
        unused = sorted(model_kwargs) + (["dtype"] if dtype is not None else [])
        if unused:
            raise ConfigurationError(
                f"a model in memory is taken as it is: {', '.join(unused)} cannot be given with it"
            )
        return optimize(model_or_path, rules, **options, progress=progress, on_plan=on_plan, plan=saved)
    hub, model_kwargs = _split_hub(model_kwargs, trust_code)
    error: NumagraftError | None = None
    try:
        source = open_checkpoint(model_or_path, trust_code=trust_code, hub=hub, config=model_kwargs.pop("config", None))
        with source, shown(progress) as callback:
            if saved is not None and dtype is None:
                dtype = saved.made_for.dtype
            chosen = _dtype_of(dtype, source)
            options["saved"] = saved
            return _load(source, rules, options, chosen, callback, on_plan, allow_unexpected, model_kwargs)
    except NumagraftError as raised:
        # its traceback holds every frame, and with them the weights that were read so far
        error = raised.with_traceback(None)
        error.__cause__ = error.__context__ = None
    gc.collect()
    raise error


def _load(
    source: Checkpoint,
    rules: Rules,
    options: dict[str, Any],
    dtype: torch.dtype,
    progress: Progress | None,
    on_plan: Callable[[Plan], Any] | None,
    allow_unexpected: Sequence[str],
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    skeleton = _build_skeleton(source, dtype, options["trust_code"], dict(model_kwargs))
    made = plan_model(skeleton, rules, **options)
    if on_plan is not None:
        on_plan(made)
    config = GraftConfig(rules=made.source, overrides=options["overrides"], trust_code=options["trust_code"])
    return carry_out(
        made,
        source,
        skeleton,
        dtype=dtype,
        config=config,
        progress=progress,
        allow_unexpected=allow_unexpected,
        **model_kwargs,
    )


def carry_out(
    plan: Plan,
    source: Checkpoint,
    skeleton: PreTrainedModel,
    *,
    dtype: torch.dtype,
    config: GraftConfig,
    progress: Progress | None = None,
    allow_unexpected: Sequence[str] = (),
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Loads `source` through the loader of transformers as `plan`, made for `skeleton`, says."""
    source.bind(skeleton)
    load = Load(plan, checkpoint=source, progress=progress, allow_unexpected=allow_unexpected)
    with active(load), transformers_bar_hidden():
        model = type(skeleton).from_pretrained(
            None, config=source.config, state_dict=source, dtype=dtype, quantization_config=config, **model_kwargs
        )
    # from_pretrained had no path to read these from
    model.name_or_path = source.source
    model.config._name_or_path = source.source
    generation_config = source.generation_config()
    if generation_config is not None and model.can_generate():
        model.generation_config = generation_config
    return model


def optimize(
    model: PreTrainedModel,
    rules: Rules = "auto",
    *,
    overrides: Sequence[str] = (),
    platform: Platform | None = None,
    runtime: RuntimeLayout | None = None,
    trust_code: bool = False,
    progress: Progress | bool | None = None,
    on_plan: Callable[[Plan], Any] | None = None,
    plan: Plan | str | Path | None = None,
) -> PreTrainedModel:
    """Grafts a model that is in memory, in place; each original weight is freed as soon as it is packed.

    `plan` is carried out as it is in place of rules, as `load_and_optimize` does.

    Raises RuleError and PlanError with the model untouched. A failure while packing (WeightError, PlacementError) leaves a
    model whose weights are partly gone: it then refuses to run, and must be loaded again.
    """
    saved = _saved(plan, rules, overrides, trust_code)
    refuse_unfit(model)
    skeleton = skeleton_of(model)
    options = {"overrides": overrides, "platform": platform, "runtime": runtime, "trust_code": trust_code}
    made = plan_model(skeleton, rules, saved=saved, **options)
    if on_plan is not None:
        on_plan(made)
    with shown(progress) as callback:
        load = Load(made, progress=callback)
        load.graft_in_memory(model, skeleton)
    model.quantization_method = METHOD
    model.is_quantized = True
    return model


def _saved(plan: Plan | str | Path | None, rules: Rules, overrides: Sequence[str], trust_code: bool) -> Plan | None:
    from numagraft.planning import Plan

    if plan is None:
        return None
    if not (isinstance(rules, str) and rules == "auto") or overrides:
        raise ConfigurationError("a plan is carried out as it is: give a plan, or rules and overrides, not both")
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | Path):
        raise ConfigurationError(f"plan={plan!r} is no plan: give a Plan or the file of one")
    return Plan.read(plan, trust_code=trust_code)


def _split_hub(kwargs: dict[str, Any], trust_code: bool) -> tuple[HubOptions, dict[str, Any]]:
    for name in ("device_map", "max_memory", "offload_folder"):
        if kwargs.get(name) is not None:
            refuse_device_map(kwargs[name])
    taken = {"quantization_config", "state_dict", "trust_remote_code", "torch_dtype"} & kwargs.keys()
    if taken:
        raise ConfigurationError(
            f"load_and_optimize does not take {', '.join(sorted(taken))}: rules say how weights are stored; use rules=, "
            "trust_code= and dtype= instead"
        )
    hub = {name: value for name, value in kwargs.items() if name in _HUB_KWARGS}
    return HubOptions(**hub, trust_code=trust_code), {k: v for k, v in kwargs.items() if k not in _HUB_KWARGS}


def _dtype_of(dtype: torch.dtype | str | None, source: Checkpoint) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return source.dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ConfigurationError(
            f"dtype={dtype!r} is no dtype of a model; give 'auto', torch.float32 or torch.bfloat16"
        )
    return found


def _build_skeleton(
    source: Checkpoint, dtype: torch.dtype, trust_code: bool, model_kwargs: dict[str, Any]
) -> PreTrainedModel:
    from numagraft import skeleton

    return skeleton.build_for(source, dtype=dtype, trust_code=trust_code)
