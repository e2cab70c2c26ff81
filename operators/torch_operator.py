"""`torch`: the original computation on the rule's device, with the crossings there and back.

The replacement keeps the replaced module's class as a base, so whatever its family asks of it (attributes, `isinstance`,
`_init_weights`, hooks, the signature of `forward`) still holds; only `forward` is wrapped.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from numagraft.contract import Accepted, Footprint, Operator, Rejected, Units
from numagraft.errors import ConfigurationError, Problem, WeightError
from numagraft.operators.crossing import first_device, move, move_tree

if TYPE_CHECKING:
    from numagraft.native import Runtime
    from numagraft.placement import Placement
    from numagraft.platform import Platform

# what the contract adds to a module; a replaced class must not use these names for something of its own
_CONTRACT_NAMES = tuple(name for name in vars(Operator) if not name.startswith("__") and name != "forward")


class Torch(Operator):
    """Any module, its whole subtree included, computed by torch on another device.

    Tensors in the arguments (in nested tuples, lists and dicts too) move to the device; those in the result move back to
    where the caller's first tensor was. A key-value cache passes through and lives where its tensors are made.
    """

    @dataclass(frozen=True)
    class Params:
        """No kwargs: the device is the rule's own."""

    @classmethod
    def check(cls, module: nn.Module, params: Any, platform: Platform | None) -> Accepted | Rejected:
        if isinstance(module, Operator):
            return Rejected("it has been replaced already")
        if "forward" in vars(module):
            return Rejected("its forward was replaced on the instance, and the crossings would be lost")
        for name, tensor in _named_tensors(module):
            if isinstance(tensor, nn.UninitializedParameter):
                return Rejected(f"its parameter {name} has no shape yet")
        if taken := sorted(name for name in _CONTRACT_NAMES if hasattr(type(module), name)):
            return Rejected(f"{type(module).__name__} uses the name {taken[0]!r} itself, which an operator needs")
        try:
            _grafted_class(type(module))
        except TypeError as error:
            return Rejected(f"{type(module).__name__} cannot be subclassed: {error}")
        return Accepted()

    @classmethod
    def check_device(cls, device: str, platform: Platform | None) -> Accepted | Rejected:
        verdict = super().check_device(device, platform)
        if isinstance(verdict, Rejected):
            return verdict
        wanted = torch.device(device)
        if wanted.type == "meta":
            return Rejected("nothing can be computed on the meta device")
        return Accepted()

    @classmethod
    def units(cls, module: nn.Module, params: Any) -> Units | None:
        return None

    @classmethod
    def footprint(cls, module: nn.Module, params: Any, placement: Placement | None, device: str) -> Footprint:
        """All parameters and buffers, once; the bytes read per token count every one of them (an upper bound for a subtree
        with experts)."""
        total = sum(tensor.numel() * tensor.element_size() for _, tensor in _named_tensors(module))
        return Footprint(device_bytes={device: total}, bytes_per_token=total)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        params: Any,
        *,
        name: str,
        placement: Placement | None,
        runtime: Runtime | None,
        device: str,
    ) -> Operator:
        """The module under its own class, wrapped; shares parameters, buffers and children with `module`."""
        verdict = cls.check_device(device, None)
        if isinstance(verdict, Rejected):
            raise ConfigurationError(f"{name}: the torch operator cannot use device {device!r}: {verdict.reason}")
        grafted_class = _grafted_class(type(module))
        grafted = grafted_class.__new__(grafted_class)
        grafted.__dict__.update(vars(module))
        grafted._graft_name = name
        grafted._graft_device = torch.device(device)
        grafted._graft_loaded = {}
        return grafted

    def load(self, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        owner, leaf, current = self._target(name)
        _check_tensor(f"{self._graft_name}.{name}", current, tensor, expert)
        loaded = self._graft_loaded.setdefault(name, set())
        if expert in loaded or None in loaded or (expert is None and loaded):
            which = name if expert is None else f"{name}, expert {expert},"
            raise WeightError(f"{self._graft_name}: {which} came twice")
        if expert is None:
            _store(owner, leaf, current, _owned(tensor).to(device=self._graft_device, dtype=current.dtype))
        else:
            if not loaded:
                _store(owner, leaf, current, torch.empty_like(current, device=self._graft_device))
            with torch.no_grad():
                getattr(owner, leaf)[expert].copy_(tensor)
        loaded.add(expert)

    def missing(self) -> list[str]:
        names = []
        for name, tensor in _named_tensors(self):
            loaded = self._graft_loaded.get(name, set())
            if tensor.is_meta:
                names.append(name)
            elif loaded and None not in loaded:
                names += [f"{name}[{expert}]" for expert in range(tensor.shape[0]) if expert not in loaded]
        return names

    def finish(self) -> None:
        if missing := self.missing():
            problems = [Problem(f"{self._graft_name}.{name}", "never arrived") for name in missing]
            raise WeightError("the torch operator lacks weights", problems)
        for name, tensor in list(_named_tensors(self)):  # ties and buffers, which nobody handed to `load`
            owner, leaf, _ = self._target(name)
            if move(tensor, self._graft_device) is not tensor:
                _store(owner, leaf, tensor, tensor.detach().to(self._graft_device))

    def extra_repr(self) -> str:
        original = super().extra_repr()
        return ", ".join(filter(None, [original, f"device={self._graft_device}"]))

    def _target(self, name: str) -> tuple[nn.Module, str, torch.Tensor]:
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.get_submodule(path)
        except AttributeError:
            owner = None
        tensor = None
        if owner is not None:
            tensor = owner._parameters.get(leaf)
            tensor = owner._buffers.get(leaf) if tensor is None else tensor
        if owner is None or tensor is None:
            known = [known for known, _ in _named_tensors(self)]
            close = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(known[:8])}"
            raise WeightError(f"{self._graft_name} has no tensor named {name!r}; {hint}")
        return owner, leaf, tensor


@cache
def _grafted_class(original: type[nn.Module]) -> type[Torch]:
    @wraps(original.forward)
    def forward(self, *args, **kwargs):
        home = first_device((args, kwargs))
        moved: dict[int, torch.Tensor] = {}
        args = move_tree(args, self._graft_device, moved)
        kwargs = move_tree(kwargs, self._graft_device, moved)
        result = original.forward(self, *args, **kwargs)
        return result if home is None else move_tree(result, home)

    grafted = type(f"Torch{original.__name__}", (Torch, original), {"__module__": __name__, "__doc__": original.__doc__})
    grafted.forward = forward  # only now: bases such as GradientCheckpointingLayer wrap the forward a subclass is born with
    return grafted


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied when it is a view that would keep a larger storage alive."""
    tensor = tensor.detach()
    if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def _store(owner: nn.Module, leaf: str, current: torch.Tensor, value: torch.Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=current.requires_grad)
    else:
        owner._buffers[leaf] = value


def _check_tensor(where: str, current: torch.Tensor, tensor: torch.Tensor, expert: int | None) -> None:
    expected = tuple(current.shape)
    if expert is not None:
        if not expected or not 0 <= expert < expected[0]:
            raise WeightError(f"{where}: there is no expert {expert}; the parameter's shape is {list(expected)}")
        expected = expected[1:]
    if tuple(tensor.shape) != expected:
        raise WeightError(f"{where}: found shape {list(tensor.shape)}, expected {list(expected)}")
    if tensor.is_meta:
        raise WeightError(f"{where}: the tensor is on the meta device, it has no values")
    if tensor.is_floating_point() != current.is_floating_point():
        raise WeightError(f"{where}: found dtype {tensor.dtype}, expected one like {current.dtype}")
