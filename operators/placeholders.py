"""What stands where a weight was: a meta Parameter while loading, an object that only describes itself afterwards."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from numagraft.errors import UnsupportedOperationError


class AbsentWeightError(UnsupportedOperationError, AttributeError):
    """Also an AttributeError, so that `hasattr(weight, "CB")` answers False instead of raising."""


def placeholder(tensor: torch.Tensor) -> nn.Parameter:
    """A meta Parameter of the same shape and dtype: the loader sees the name, memory sees nothing."""
    return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), requires_grad=False)


class AbsentWeight:
    """Answers shape, dtype and device of a weight that lives packed elsewhere; raises on anything that would compute.

    Families peek at `child.weight.dtype` or `.device`; torch itself would compute garbage from a meta tensor in silence.
    """

    __slots__ = ("device", "dtype", "name", "shape")

    is_meta = False
    is_cuda = False
    is_cpu = True
    is_sparse = False
    is_quantized = False
    requires_grad = False
    grad = None

    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __repr__(self) -> str:
        return f"AbsentWeight({self.name}, shape={list(self.shape)}, dtype={self.dtype}, packed by numagraft)"

    def __getattr__(self, name: str) -> Any:
        self._refuse(name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = next((arg for arg in [*args, *(kwargs or {}).values()] if isinstance(arg, cls)), None)
        if found is None:  # inside a list of tensors, as torch.cat takes it
            found = next(item for arg in args if isinstance(arg, (list, tuple)) for item in arg if isinstance(item, cls))
        found._refuse(getattr(func, "__name__", str(func)))

    def _refuse(self, operation: str) -> NoReturn:
        raise AbsentWeightError(
            f"{self.name} is packed by numagraft and no longer a tensor, so {operation!r} cannot be computed with it; "
            f"only its shape, dtype and device are known. Keep this module with a rule `class: default`."
        )


def _refusing(operation: str):
    def method(self, *args, **kwargs):
        self._refuse(operation)

    method.__name__ = operation
    return method


# Python looks these up on the class, past __getattr__
for _name in (
    *("matmul", "rmatmul", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "getitem"),
    *("setitem", "len", "iter", "array", "float", "int", "bool", "lt", "le", "gt", "ge"),
):
    setattr(AbsentWeight, f"__{_name}__", _refusing(f"__{_name}__"))
