"""A second device that computes, for machines without one.

Tensors on it wrap a CPU tensor. As on a real device, an operation on tensors of both devices is an error, and only a copy
crosses; every crossing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: a CPU index that torch accepts and does not have: everything computes, slices included
DEVICE = torch.device("cpu", 1)
#: of another type than the CPU, as a GPU is; torch refuses to slice on it, since it has no kernels for it
OTHER_TYPE = torch.device("maia", 0)


@dataclass
class Crossings:
    """Shapes of the tensors that went to the device and that came back, in order."""

    there: list[tuple[int, ...]] = field(default_factory=list)
    back: list[tuple[int, ...]] = field(default_factory=list)


class DeviceTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor, home: torch.device) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="cpu", dispatch_device=True
        )

    def __init__(self, inner: torch.Tensor, home: torch.device) -> None:
        self.inner = inner
        self.home = home

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].home
        raise AssertionError(f"{func} outside of second_device()")


class _Mode(TorchDispatchMode):
    def __init__(self, device: torch.device, crossings: Crossings) -> None:
        super().__init__()
        self.device = device
        self.crossings = crossings

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].home
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target) == self.device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if target is not None:
            kwargs["device"] = "cpu" if to_device else target
        if func is torch.ops.aten.copy_.default:
            into, source = args[:2]
            func(_inner(into), _inner(source), *args[2:])
            return into
        if func is torch.ops.aten._to_copy.default:
            source = args[0]
            result = func(_inner(source), **kwargs)
            if to_device and not isinstance(source, DeviceTensor):
                self.crossings.there.append(tuple(source.shape))
            if isinstance(source, DeviceTensor) and target is not None and not to_device:
                self.crossings.back.append(tuple(source.shape))
            stays = isinstance(source, DeviceTensor) and target is None
            return DeviceTensor(result, self.device) if to_device or stays else result
        # scalars may mix, as in torch; torch.tensor([], device=...) never asks a dispatch mode where to be made
        homes = {tensor.device for tensor in tensors if isinstance(tensor, DeviceTensor) or tensor.shape not in ((), (0,))}
        if self.device in homes and len(homes) > 1 and target is None:
            raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, homes))}")
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if to_device or (self.device in homes and target is None):
            return tree_map(lambda leaf: DeviceTensor(leaf, self.device) if isinstance(leaf, torch.Tensor) else leaf, result)
        return result


def _inner(value):
    return value.inner if isinstance(value, DeviceTensor) else value


@contextmanager
def second_device(device: torch.device = DEVICE) -> Iterator[Crossings]:
    """Inside, torch computes on `device`; what crosses is recorded. Without gradients."""
    crossings = Crossings()
    with torch.no_grad(), _Mode(device, crossings):
        yield crossings
