"""Torch tensors as the native backend sees them: address, dtype name, shape, strides."""

from __future__ import annotations

import torch

from numagraft import native
from numagraft.contract import StoredMatrix
from numagraft.errors import WeightError

#: what the native backend reads and writes as weights, inputs and outputs; int64 is for expert indices only
DTYPES: dict[torch.dtype, str] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_NAMES = DTYPES | {torch.int64: "i64"}


def matrix(tensor: torch.Tensor) -> native.Matrix:
    """A 2-D CPU tensor of any strides, not copied: the caller keeps it alive while the Matrix is used."""
    rows, columns = tensor.shape
    row_stride, column_stride = tensor.stride()
    return native.Matrix(tensor.data_ptr(), _NAMES[tensor.dtype], rows, columns, row_stride, column_stride)


def row(tensor: torch.Tensor) -> native.Matrix:
    """A 1-D CPU tensor of any stride as one row."""
    return native.Matrix(tensor.data_ptr(), DTYPES[tensor.dtype], 1, tensor.shape[0], tensor.shape[0], tensor.stride(0))


def file_matrix(stored: StoredMatrix) -> native.FileMatrix:
    """A matrix in a file; the caller keeps it, and so its scales, alive while the FileMatrix is used."""
    scales = stored.scales
    return native.FileMatrix(
        stored.descriptor,
        stored.offset,
        stored.file_bytes,
        stored.coding,
        stored.rows,
        stored.columns,
        stored.row_stride,
        *((0, 0) if scales is None else (scales.data_ptr(), scales.stride(0))),
    )


def check_weight(where: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The detached tensor, ready for packing.

    Raises WeightError when its shape is not `shape`, it is not in CPU memory, or no native dtype holds its values.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise WeightError(f"{where}: found shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.device.type != "cpu":
        raise WeightError(f"{where}: the tensor is on {tensor.device}, expected cpu")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise WeightError(f"{where}: found dtype {str(tensor.dtype).removeprefix('torch.')}, expected one of {names}")
    return tensor.detach()
