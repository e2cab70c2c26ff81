"""Operators as torch sees them under `torch.compile` and on meta: `torch.ops.numagraft.*`.

Registered with `Library.define`/`impl` (2.4 us a call; `torch.library.custom_op` costs 8). Eager forwards do not come by
here: they call the native backend directly. An operator is named by an integer handle, since a schema takes no objects.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from numagraft.contract import Operator

_operators: weakref.WeakValueDictionary[int, Operator] = weakref.WeakValueDictionary()
_handles = itertools.count()

_library = torch.library.Library("numagraft", "DEF")
_library.define("linear(Tensor x, int handle, int out_features) -> Tensor")
_library.define("experts(Tensor x, Tensor index, Tensor weights, int handle) -> Tensor")


def register(operator: Operator) -> int:
    """A handle under which the custom ops find `operator` as long as it lives."""
    handle = next(_handles)
    _operators[handle] = operator
    return handle


def _linear(x: torch.Tensor, handle: int, out_features: int) -> torch.Tensor:
    return _operators[handle].compute(x)


def _linear_shape(x: torch.Tensor, handle: int, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, handle: int) -> torch.Tensor:
    return _operators[handle].compute(x, index, weights)


def _experts_shape(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, handle: int) -> torch.Tensor:
    return x.new_empty(x.shape)


_library.impl("linear", _linear, "CPU")
_library.impl("experts", _experts, "CPU")
torch.library.register_fake("numagraft::linear", _linear_shape, lib=_library)
torch.library.register_fake("numagraft::experts", _experts_shape, lib=_library)
