"""What each module of a model does, whatever it is called: one role, its layer and its tower. Imports torch.

Structure decides before names do: an experts module is one that holds fused three-dimensional parameters, a router is what
scores as many outputs as there are experts. Names decide where structure is silent (attention against other mixers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from torch import nn

from numagraft.rulefile.rules import Role, Tower

ROLES: tuple[str, ...] = get_args(Role)
TOWERS: tuple[str, ...] = get_args(Tower)

_NORM = re.compile(r"norm", re.IGNORECASE)
_ATTENTION = re.compile(r"(?i:attention|attn(?!norm)|deltanet)(?!\w*(Layer|Block)$)|MLA$")
_MLP = re.compile(r"mlp$|feed_?forward$|ffn$|mlp_block$", re.IGNORECASE)
_EXPERTS = re.compile(r"experts?", re.IGNORECASE)
_ROUTER = re.compile(r"router|(?<!shared_expert_)gate$|gating|topk|(?<![a-z])wg$", re.IGNORECASE)
_SHARED = re.compile(r"shared", re.IGNORECASE)
_LAYER = re.compile(r"(layer|block)\w*$", re.IGNORECASE)
_STACK_NAMES = {"layers", "layer", "h", "blocks", "block", "decoder_layers"}
_VISION = re.compile(r"vision|visual|image|pixel|patch_?embed|(?:^|_)vit(?:$|_)|vq_?model|vqvae|resampler|perceiver|siglip")
_AUDIO = re.compile(r"audio|speech|sound|mel_|code2wav|token2wav|depth_decoder")
_JOINT = re.compile(r"multi_?modal_proj|mm_proj|projector|connector|aligner|merger")


@dataclass(frozen=True)
class ModuleInfo:
    """One module: `role` is None where none of the roles fits, `layer` counts within its own stack of layers."""

    name: str
    module: nn.Module
    role: str | None
    layer: int | None
    tower: str

    @cached_property
    def class_name(self) -> str:
        return type(self.module).__name__


def survey(model: nn.Module) -> list[ModuleInfo]:
    """Every module below `model`, in pre-order, each once (under its first name). Computes nothing; meta is fine."""
    return _Survey(model).infos


def role_of(model: nn.Module, name: str) -> str | None:
    """The role of the module called `name`. Raises KeyError when there is none."""
    for info in survey(model):
        if info.name == name:
            return info.role
    raise KeyError(name)


def count_experts(module: nn.Module) -> int | None:
    """How many experts `module` holds fused or as a list; None when it is no experts module."""
    if isinstance(module, nn.ModuleList):
        return len(module) if len(module) > 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return None
    fused = [p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3 and p.shape[0] > 1]
    if not fused:
        return None
    if any(_EXPERTS.search(cls.__name__) for cls in type(module).__mro__[:-1]):
        return min(fused)  # identity ("zero") experts may have rows in one tensor and not in the other
    declared = getattr(module, "num_experts", None) or getattr(module, "num_local_experts", None)
    return fused[0] if set(fused) == {declared} else None


class _Survey:
    """One walk; roles that depend on siblings are assigned by the parent before the walk reaches the child."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._roles: dict[int, str | None] = {}
        self._seen: set[int] = {id(model)}
        self._towers = _tower_configs(getattr(model, "config", None))
        self._head = _output_embeddings(model)
        self.infos: list[ModuleInfo] = []
        self._visit_children(model, "", layer=None, tower="text", inside=None)

    def _visit_children(self, module: nn.Module, name: str, *, layer: int | None, tower: str, inside: str | None) -> None:
        self._assign_moe(module, inside)
        stack = layer is None and _is_stack(module, name)
        for key, child in module._modules.items():
            if child is None or id(child) in self._seen:
                continue
            self._seen.add(id(child))
            path = f"{name}.{key}" if name else key
            child_layer = int(key) if stack and key.isdigit() else layer
            child_tower = tower if layer is not None else self._tower(child, key, tower)
            if stack:
                role: str | None = "decoder_layer"
            else:
                role = self._role(child, key, inside=inside)
            self.infos.append(ModuleInfo(path, child, role, child_layer, child_tower))
            below = inside
            if role in ("router", "attention", "experts", "mlp", "shared_experts", "norm"):
                below = role
            elif role in ("moe", "decoder_layer"):
                below = None
            self._visit_children(child, path, layer=child_layer, tower=child_tower, inside=below)

    def _assign_moe(self, module: nn.Module, inside: str | None) -> None:
        """Gives the children of a mixture of experts their roles, and a router's linears the router's."""
        children = {key: child for key, child in module._modules.items() if child is not None}
        if not children or isinstance(module, nn.ModuleList):
            return
        experts = _experts_children(children)
        if not experts:
            return
        counts = set(experts.values())
        for key in experts:
            self._roles[id(children[key])] = "experts"
        self._roles.setdefault(id(module), "moe")
        for key, child in children.items():
            if id(child) in self._roles:
                continue
            if _is_router(child, key, counts):
                self._roles[id(child)] = "router"
            elif isinstance(child, nn.Linear) and child.out_features == 1:
                self._roles[id(child)] = "shared_expert_gate"
            elif _SHARED.search(key) and (_holds_linears(child) or count_experts(child) is not None):
                self._roles[id(child)] = "shared_experts"

    def _role(self, module: nn.Module, key: str, *, inside: str | None) -> str | None:
        if module is self._head:
            return "lm_head"
        if id(module) in self._roles:
            return self._roles[id(module)]
        kind = type(module).__name__
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, nn.Linear):
            if inside == "router":
                return "router"
            plain = not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            return "linear" if plain and module.out_features > 1 else None
        children = {name: child for name, child in module._modules.items() if child is not None}
        if kind.endswith("Norm") or (_NORM.search(kind) and not _holds_linears(module)):
            return "norm"
        experts = _experts_children(children) if children and not isinstance(module, nn.ModuleList) else {}
        if experts and not _holds_attention(children):
            return "moe"
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return None
        if inside in ("attention", "router", "experts"):
            return "attention" if inside == "attention" and _ATTENTION.search(kind) and _holds_linears(module) else None
        if _ATTENTION.search(kind) and children and _holds_projection(module):
            return "attention"
        if _SHARED.search(key) and inside != "mlp" and _holds_linears(module) and not _LAYER.search(kind):
            return "shared_experts"
        if _MLP.search(kind) and _holds_projection(module) and inside not in ("mlp", "shared_experts", "norm"):
            return "mlp"
        return None

    def _tower(self, module: nn.Module, key: str, tower: str) -> str:
        found = self._towers.get(id(getattr(module, "config", None)))
        if found is not None:
            return found
        if _VISION.search(key):
            return "vision"
        if _AUDIO.search(key):
            return "audio"
        if _JOINT.search(key) and tower == "text":
            kinds = set(self._towers.values())
            return "vision" if "vision" in kinds else "audio" if "audio" in kinds else tower
        return tower


def _experts_children(children: Mapping[str, nn.Module]) -> dict[str, int]:
    """The children that hold experts, and how many each holds."""
    found = {}
    for key, child in children.items():
        count = count_experts(child)
        if count is None or _SHARED.search(key):
            continue
        if isinstance(child, nn.ModuleList) and not (
            _EXPERTS.search(key)
            and not _SHARED.search(key)
            and any(_is_router(other, name, {count}) for name, other in children.items() if other is not child)
        ):
            continue
        found[key] = count
    return found


def _is_router(module: nn.Module, key: str, counts: set[int]) -> bool:
    """Whether `module` scores experts: a matrix with one row per expert, in itself or in one of its linears."""
    if isinstance(module, nn.Embedding | nn.ModuleList) or not (_ROUTER.search(key) or _ROUTER.search(type(module).__name__)):
        return False
    if isinstance(module, nn.Linear):
        # identity ("zero") experts are scored too, so there may be more rows than experts
        return any(module.out_features >= count for count in counts)
    own = [p for p in module._parameters.values() if p is not None and p.ndim == 2]
    inner = [child.weight for child in module.modules() if isinstance(child, nn.Linear)]
    return any(weight.shape[0] >= count for weight in (*own, *inner) for count in counts)


def _holds_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _holds_projection(module: nn.Module) -> bool:
    """A linear layer, or transformers' Conv1D, somewhere below."""
    return any(isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D" for child in module.modules())


def _holds_attention(children: Mapping[str, nn.Module]) -> bool:
    return any(_ATTENTION.search(type(child).__name__) and not _NORM.search(key) for key, child in children.items())


def _is_stack(module: nn.Module, name: str) -> bool:
    """Whether `module` lists decoder (or encoder) layers."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        return False
    first = next(iter(module))
    if not isinstance(first, nn.Module) or isinstance(first, nn.Linear | nn.Embedding | nn.ModuleList):
        return False
    if len(list(first.modules())) < 4:
        return False
    bases = {cls.__name__ for cls in type(first).__mro__}
    if "GradientCheckpointingLayer" in bases:
        return True
    return name.rpartition(".")[2] in _STACK_NAMES and _LAYER.search(type(first).__name__) is not None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    if get is not None:
        try:
            head = get()
        except (AttributeError, NotImplementedError):
            head = None
        if isinstance(head, nn.Module):
            return head
    for key in ("lm_head", "embed_out", "output_projection"):
        if isinstance(model._modules.get(key), nn.Module):
            return model._modules[key]
    return None


def _tower_configs(config: Any) -> dict[int, str]:
    """The sub-configurations of a multimodal config, by identity, and the tower each describes."""
    found: dict[int, str] = {}

    def visit(config: Any, depth: int) -> None:
        for key in getattr(type(config), "sub_configs", None) or {}:
            child = getattr(config, key, None)
            if child is None or isinstance(child, dict) or id(child) in found:
                continue
            tower = "vision" if _VISION.search(key) else "audio" if _AUDIO.search(key) else "text"
            found[id(child)] = tower
            if depth < 3:
                visit(child, depth + 1)

    if config is not None:
        visit(config, 0)
    return found
