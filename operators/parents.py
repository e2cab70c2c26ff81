"""Whether a parent computes with a child's weight itself, read from the parent's source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

# what a parent may ask of a child's weight once it is packed: placeholders.AbsentWeight answers these
_PEEKS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "element_size", "is_floating_point", "requires_grad"}
# never part of computing with a loaded model
_SETUP = {
    "__init__",
    "_init_weights",
    "_reset_parameters",
    "_tie_weights",
    "reset_parameters",
    "set_output_embeddings",
    "tie_weights",
}
_WEIGHTS = {"weight", "bias", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}


def computes_with(parent: nn.Module, attribute: str) -> str | None:
    """Where `parent`'s class computes with a weight of `self.<attribute>` instead of calling the child, for example
    "BambaMixer.cuda_kernels_forward"; None when it does not, or its source cannot be read."""
    for cls in type(parent).__mro__:
        if cls.__module__ in ("torch.nn.modules.module", "builtins", "transformers.modeling_utils"):
            continue
        for child, method in _uses(cls):
            if child == attribute:
                return f"{cls.__name__}.{method}"
    return None


@cache
def _uses(cls: type) -> tuple[tuple[str, str], ...]:
    """(child, method) for every `self.child.weight` in the class that is more than a peek."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found = set()
    for method in tree.body[0].body:
        if isinstance(method, ast.FunctionDef) and method.name not in _SETUP:
            found |= {(child, method.name) for child in _computed_children(method)}
    return tuple(sorted(found))  # always the same one is named


def _computed_children(method: ast.FunctionDef) -> set[str]:
    harmless = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _PEEKS:
            harmless.add(id(node.value))
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            harmless.add(id(node.left))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
            harmless.add(id(node.args[0]))
    return {
        node.value.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr in _WEIGHTS
        and isinstance(node.ctx, ast.Load)
        and id(node) not in harmless
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    }
