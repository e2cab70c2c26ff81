"""Tensors inside nested arguments: where they are, and moving them to another device."""

from __future__ import annotations

from copy import copy
from dataclasses import is_dataclass
from typing import Any

import torch


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the very same object when it is there already."""
    return tensor if same_device(tensor.device, device) else tensor.to(device)


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; "cuda" without an index stands for the current device, as in torch."""
    if one.type != other.type:
        return False
    return _index(one) == _index(other)


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_initialized() else 0


def first_device(tree: Any) -> torch.device | None:
    """The device of the first tensor in nested tuples, lists and dicts, depth first; None when there is none."""
    if isinstance(tree, torch.Tensor):
        return tree.device
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return None
    for item in tree:
        if (device := first_device(item)) is not None:
            return device
    return None


def move_tree(tree: Any, device: torch.device, moved: dict[int, torch.Tensor] | None = None) -> Any:
    """`tree` with every tensor in nested tuples, lists and dicts (subclasses included) on `device`.

    A container without a tensor to move is returned itself, so what a caller mutates stays the caller's; a tensor that
    occurs twice is copied once. Other objects pass through: a key-value cache keeps its tensors where it made them.
    """
    moved = {} if moved is None else moved
    if isinstance(tree, torch.Tensor):
        if id(tree) not in moved:
            moved[id(tree)] = move(tree, device)
        return moved[id(tree)]
    if isinstance(tree, dict):
        return _rebuilt_dict(tree, {key: move_tree(value, device, moved) for key, value in tree.items()})
    if isinstance(tree, (tuple, list)):
        items = [move_tree(item, device, moved) for item in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        if hasattr(tree, "_fields"):  # a namedtuple takes its items one by one
            return type(tree)(*items)
        return type(tree)(items)
    return tree


def _rebuilt_dict(original: dict, items: dict) -> dict:
    if all(items[key] is original[key] for key in original):
        return original
    if is_dataclass(original):  # ModelOutput forbids update
        return type(original)(**items)
    rebuilt = copy(original)
    rebuilt.update(items)
    return rebuilt
