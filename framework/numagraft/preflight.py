"""Whether a checkpoint is one of this model, decided from names, shapes and dtypes before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from numagraft.checkpoints import Checkpoint, LazyTensor
from numagraft.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 6


@dataclass
class Target:
    """What a checkpoint holds for one parameter: tensors by source pattern, in the order in which they are merged."""

    converter: WeightConverter | None
    sources: dict[str, list[LazyTensor]] = field(default_factory=dict)


def merges_experts(converter: WeightConverter) -> bool:
    """Whether a converter stacks per-expert tensors, and at most joins them along each expert's rows.

    Such a converter does to every expert the same, so experts may be handed over one by one.
    """
    operations = converter.operations
    return (
        0 < len(operations) <= 2
        and type(operations[0]) is MergeModulelist
        and operations[0].dim == 0
        and all(type(operation) is Concatenate and operation.dim == 1 for operation in operations[1:])
        and len(converter.target_patterns) == 1
        and (len(operations) == 2 or len(converter.source_patterns) == 1)
    )


def map_names(
    checkpoint: Checkpoint, conversions: Iterable[WeightTransform], model: PreTrainedModel
) -> tuple[dict[str, Target], list[str]]:
    """Which tensors go to which parameter, as the loader of transformers will decide it, and those that go nowhere."""
    conversions = deepcopy(list(conversions))  # renaming leaves marks in them
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    targets: dict[str, Target] = {}
    unexpected: list[str] = []
    for name in sorted(checkpoint, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, pattern = rename_source_key(name, [], [], prefix, parameters)
        if renamed not in parameters:
            unexpected.append(name)
            continue
        converter = by_pattern.get(pattern) if pattern is not None else None
        target = targets.setdefault(renamed, Target(converter))
        target.sources.setdefault(pattern or name, []).append(checkpoint[name])
    return targets, unexpected


def check(
    checkpoint: Checkpoint,
    conversions: Iterable[WeightTransform],
    model: PreTrainedModel,
    *,
    allow_unexpected: Sequence[str] = (),
    refuse_unexpected: bool = True,
) -> None:
    """Raises CheckpointError listing parameters without tensors, tensors without place, and shapes that differ."""
    targets, unexpected = map_names(checkpoint, conversions, model)
    parameters = model.state_dict()
    filled = set(targets)
    for name, target in targets.items():
        if target.converter is not None and len(target.converter.target_patterns) > 1:
            first, *others = target.converter.target_patterns
            filled.update(name.replace(first, other) for other in others)
        if target.converter is not None and "*" in "".join(target.converter.target_patterns):
            filled.update(_starred(target.converter, parameters))
    missing = _missing(model, parameters, filled)
    unexpected = _unexpected(model, unexpected, allow_unexpected) if refuse_unexpected else []
    wrong = [problem for name, target in targets.items() for problem in _shape_problems(name, target, parameters[name])]
    if not (missing or unexpected or wrong):
        return
    told = [
        f"{len(missing)} of its {len(parameters)} parameters are not in the checkpoint" if missing else "",
        f"{len(wrong)} tensors do not have the shape or dtype the model needs" if wrong else "",
        f"{len(unexpected)} tensors have no place in the model" if unexpected else "",
    ]
    remedy = "weights and configuration are of different models or revisions: check that both come from the same place"
    if unexpected and not missing and not wrong:
        remedy = "if the model is complete without them, allow them by name: allow_unexpected=['REGEX']"
    raise CheckpointError(
        f"{checkpoint.source} does not fit {type(model).__name__}: {', '.join(text for text in told if text)}; {remedy}",
        [
            *_some([Problem(name, "is not in the checkpoint") for name in missing]),
            *_some(wrong),
            *_some([Problem(name, "has no place in the model") for name in unexpected]),
        ],
    )


def _some(problems: list[Problem]) -> list[Problem]:
    if len(problems) <= _SHOWN:
        return problems
    return [*problems[:_SHOWN], Problem("", f"and {len(problems) - _SHOWN} more of the kind")]


def _starred(converter: WeightConverter, parameters: dict[str, torch.Tensor]) -> set[str]:
    patterns = [re.escape(pattern).replace(r"\*", r"\d+") for pattern in converter.target_patterns]
    return {name for name in parameters if any(re.search(pattern, name) for pattern in patterns)}


def _missing(model: PreTrainedModel, parameters: dict[str, torch.Tensor], filled: set[str]) -> list[str]:
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    groups = [{source, *(target for target, other in ties.items() if other == source)} for source in set(ties.values())]
    tied = {name for group in groups if group & filled for name in group}
    ignored = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    return [
        name
        for name in parameters
        if name not in filled and name not in tied and not any(re.search(pattern, name) for pattern in ignored)
    ]


def _unexpected(model: PreTrainedModel, names: list[str], allowed: Sequence[str]) -> list[str]:
    # tables that older checkpoints stored and that models compute themselves by now
    computed = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"]
    patterns = [*computed, *allowed, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _shape_problems(name: str, target: Target, parameter: torch.Tensor) -> list[Problem]:
    converter, tensors = target.converter, [tensor for each in target.sources.values() for tensor in each]
    coded = [
        t for t in tensors if parameter.is_floating_point() and (not t.is_floating_point() or t.dtype.itemsize == 1)
    ]
    if coded:
        return [
            Problem(
                coded[0].name,
                f"holds {coded[0].get_dtype()} values, but {name} is floating point: the checkpoint is quantised",
                "give the unquantised bf16 or fp16 checkpoint of this model",
            )
        ]
    if converter is None:
        if len(tensors) > 1:
            found = ", ".join(tensor.name for tensor in tensors)
            return [Problem(name, f"has {len(tensors)} tensors in the checkpoint: {found}")]
        return [] if tensors[0].shape == parameter.shape else [_shape_problem(name, tensors[0].shape, parameter.shape)]
    if not merges_experts(converter):
        return []
    experts = parameter.shape[0]
    rows = 0
    for pattern in converter.source_patterns:
        found = target.sources.get(pattern, [])
        indices = [_expert_index(pattern, tensor.name) for tensor in found]
        if None not in indices and indices != list(range(experts)):
            absent = sorted(set(range(experts)) - set(indices))
            extra = sorted(set(indices) - set(range(experts)))
            text = f"lacks experts {absent[:_SHOWN]}" if absent else f"has experts {extra[:_SHOWN]}"
            return [Problem(name, f"{text} of {pattern!r}; the model has {experts}")]
        if len(found) != experts:
            return [Problem(name, f"is made of {len(found)} tensors of {pattern!r}; the model has {experts} experts")]
        different = next((tensor for tensor in found if tensor.shape != found[0].shape), None)
        if different is not None:
            return [_shape_problem(different.name, different.shape, found[0].shape)]
        rows += found[0].shape[0]
    merged = torch.Size((experts, rows, *tensors[0].shape[1:]))
    return [] if merged == parameter.shape else [_shape_problem(name, merged, parameter.shape)]


def _shape_problem(name: str, found: torch.Size, expected: torch.Size) -> Problem:
    return Problem(name, f"has the shape {list(found)} in the checkpoint; the model needs {list(expected)}")


def _expert_index(pattern: str, name: str) -> int | None:
    found = re.search(pattern.replace("*.", r"(?P<expert_index>\d+)\."), name)
    return int(found["expert_index"]) if found and "expert_index" in found.groupdict() else None
