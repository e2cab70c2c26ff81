"""What a grafted model cannot do raises before anything is changed.

Every operator, and every module that holds one, gets a subclass of its own class under the same name. A check at whatever
module is asked runs before any submodule is touched; otherwise half a model would be converted when the first operator
refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from numagraft.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from numagraft.contract import Operator

_RELOAD = "load the model again with the dtype or the rules you need"


def _refuse(what: str, remedy: str) -> Callable[..., NoReturn]:
    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperationError(f"a grafted model cannot {what}; {remedy}")

    return refused


class GuardedModule:
    """Mixed in front of a module's class once its weights are packed."""

    _is_guarded = True

    __deepcopy__ = _refuse("be copied: its packed weights exist once", _RELOAD)
    __copy__ = __deepcopy__
    __reduce_ex__ = _refuse("be pickled yet", "keep the checkpoint and the rule file, and load again from them")
    state_dict = _refuse("give a state_dict: its packed weights are no tensors", "take it from the original checkpoint")
    load_state_dict = _refuse("take a state_dict: its weights are packed", _RELOAD)
    to_empty = _refuse("be emptied: its weights are packed", _RELOAD)

    def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Lets through what changes nothing (`to` the same device and dtype), after trying it on empty tensors."""
        kinds = {(tensor.dtype, tensor.device) for tensor in (*self.parameters(), *self.buffers())}
        kinds.add((self._guard_dtype, torch.device("cpu")))
        for dtype, device in kinds:
            try:
                probe = fn(torch.empty(0, dtype=dtype, device=device))
            except Exception as error:  # a device that is not there, for one
                raise UnsupportedOperationError(
                    f"a grafted model cannot be moved or cast: its weights are packed ({error}); {_RELOAD}"
                ) from error
            if (probe.dtype, probe.device) != (dtype, device):
                change = (
                    f"from {dtype} to {probe.dtype}" if probe.dtype != dtype else f"from {device} to {probe.device}"
                )
                raise UnsupportedOperationError(
                    f"a grafted model cannot go {change}: its weights are packed; {_RELOAD}"
                )
        return self

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise UnsupportedOperationError(
                "a grafted model cannot be trained: packed weights have no gradients; train the original, then load it again"
            )
        return super().train(False)

    def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise UnsupportedOperationError(
                "a grafted model has no gradients: packed weights are no parameters; train the original, then load it again"
            )
        return super().requires_grad_(False)


class GuardedModel(GuardedModule):
    """For the model itself and for models within it (`model.model`)."""

    save_pretrained = _refuse("be saved yet", "keep the original checkpoint and the rule file")
    push_to_hub = _refuse("be saved yet", "push the original checkpoint and the rule file")
    resize_token_embeddings = _refuse(
        "be resized: its weights are packed", "resize the original, save it, and load that"
    )
    dequantize = _refuse("be unpacked", "load the original checkpoint")
    half = nn.Module.half  # transformers refuses these two itself, in other words and even where nothing would change
    float = nn.Module.float

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights of the original model: packed ones count, a tied one that is packed beside its embedding counts once."""
        count = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return count
        return count + sum(
            module.grafted_numel() - module._doubled_numel
            for module in self.modules()
            if hasattr(module, "_doubled_numel")
        )

    def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
        """Bytes of parameters, buffers and packed weights, every copy of them."""
        packed = sum(module.grafted_bytes() for module in self.modules() if hasattr(module, "_doubled_numel"))
        return super().get_memory_footprint(return_buffers) + packed


@cache
def _guarded(original: type[nn.Module], mixin: type[GuardedModule]) -> type[nn.Module]:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), names)


def guard(model: PreTrainedModel, operators: Mapping[str, Operator], doubled: Mapping[str, int]) -> None:
    """Guards the model, the operators and all between them; `doubled` counts elements also held as a Parameter."""
    from transformers import PreTrainedModel

    holding = {""}
    for name, operator in operators.items():
        object.__setattr__(operator, "_doubled_numel", doubled.get(name, 0))
        while name:
            holding.add(name)
            name = name.rpartition(".")[0]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for name in holding:
        module = model.get_submodule(name)
        if not isinstance(module, GuardedModule):
            mixin = GuardedModel if isinstance(module, PreTrainedModel) else GuardedModule
            module.__class__ = _guarded(type(module), mixin)
        module._guard_dtype = dtype


def is_grafted(model: nn.Module) -> bool:
    return isinstance(model, GuardedModule)
