from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from second_device import DEVICE, second_device
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from numagraft.operators.crossing import first_device, move, move_tree

Pair = namedtuple("Pair", "left right")
CPU = torch.device("cpu")


def trees():
    leaves = st.one_of(st.none(), st.integers(), st.text(max_size=2), st.builds(lambda: torch.ones(2)))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        ),
        max_leaves=8,
    )


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in tensors_of(item)] if isinstance(tree, (list, tuple)) else []


def shape_of(tree):
    if isinstance(tree, torch.Tensor):
        return "tensor"
    if isinstance(tree, dict):
        return (type(tree), {key: shape_of(value) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return (type(tree), [shape_of(item) for item in tree])
    return tree


@given(trees())
def test_every_tensor_moves_and_nothing_else_changes(tree):
    with second_device():
        moved = move_tree(tree, DEVICE)
        assert all(tensor.device == DEVICE for tensor in tensors_of(moved))
        assert shape_of(moved) == shape_of(tree)
        assert len(tensors_of(moved)) == len(tensors_of(tree))
        again = move_tree(moved, DEVICE)
    assert again is moved


def test_a_tensor_that_occurs_twice_crosses_once():
    tensor = torch.ones(3)
    with second_device() as crossings:
        first, (second,) = move_tree((tensor, [tensor]), DEVICE)
    assert first is second
    assert crossings.there == [(3,)]


def test_the_same_container_comes_back_when_nothing_moves():
    cache = DynamicCache()
    tree = {"a": [torch.ones(1)], "cache": cache}
    assert move_tree(tree, CPU) is tree


def test_a_cache_passes_through_beside_moved_tensors():
    cache = DynamicCache()
    with second_device():
        moved = move_tree({"x": torch.ones(1), "cache": cache}, DEVICE)
    assert moved["cache"] is cache


def test_model_outputs_and_ordered_dicts_keep_their_type():
    output = BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1),))
    ordered = OrderedDict([(1, torch.ones(2)), ("b", 3)])
    with second_device():
        moved = move_tree(output, DEVICE)
        moved_ordered = move_tree(ordered, DEVICE)
    assert type(moved) is BaseModelOutput and moved.last_hidden_state.device == DEVICE
    assert moved.hidden_states[0].device == DEVICE and moved.attentions is None
    assert type(moved_ordered) is OrderedDict and list(moved_ordered) == [1, "b"]
    assert ordered[1].device == CPU


@pytest.mark.parametrize("tree", [None, [], {}, ({"a": 1},)])
def test_no_tensor_has_no_device(tree):
    assert first_device(tree) is None


def test_first_device_is_depth_first():
    with second_device():
        far = move(torch.ones(1), DEVICE)
        assert first_device(([], {"a": far}, torch.ones(1))) == DEVICE
