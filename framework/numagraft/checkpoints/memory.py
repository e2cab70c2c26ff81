"""A model that is in memory already: its skeleton, and its weights handed over and let go of one by one."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from numagraft.errors import CheckpointError, ConfigurationError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_unfit(model: object) -> None:
    """Raises unless `model` is an unquantised transformers model whose weights are all in CPU memory."""
    from transformers import PreTrainedModel

    from numagraft.checkpoints.source import refuse_quantized

    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"a model in memory must be a transformers PreTrainedModel, not {type(model).__name__}; "
            "for a checkpoint give its path or hub id"
        )
    if getattr(model, "numagraft_plan", None) is not None:
        raise ConfigurationError("this model is grafted already; load the original again to graft it by other rules")
    refuse_quantized(model.config, f"this {type(model).__name__}")
    elsewhere = [
        Problem(name, f"is on {tensor.device}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.device.type != "cpu"
    ]
    if elsewhere:
        raise CheckpointError(
            f"{len(elsewhere)} tensors of this {type(model).__name__} are not in CPU memory; load it without device_map, or "
            "move it with model.to('cpu') first",
            elsewhere[:8],
        )


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's structure with every tensor on the meta device; ties stay ties."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(model, memo)
