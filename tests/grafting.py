"""Loading with plain operators through the real machinery, for tests of what surrounds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from numagraft.api import carry_out
from numagraft.checkpoints import open_checkpoint
from numagraft.loading import Load
from numagraft.quantizer import GraftConfig
from tests import models
from tests.plain_operators import plan_plain

TOKENS = torch.tensor([[1, 5, 9, 30, 77, 3]])


def skeleton_for(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a configuration, on the meta device."""
    with torch.device("meta"):
        return models.build(config, dtype=dtype)


def load_plain(path: Path, *, lm_head: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A checkpoint loaded with plain operators in place of every linear and experts module."""
    with open_checkpoint(path) as source:
        skeleton = skeleton_for(source.config, dtype)
        plan = plan_plain(skeleton, lm_head=lm_head)
        return carry_out(plan, source, skeleton, dtype=dtype, config=GraftConfig(), **options)


def graft_plain(model: Any) -> Any:
    """A model in memory, grafted in place with plain operators."""
    from numagraft.checkpoints.memory import skeleton_of

    skeleton = skeleton_of(model)
    return Load(plan_plain(skeleton)).graft_in_memory(model, skeleton)


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits
