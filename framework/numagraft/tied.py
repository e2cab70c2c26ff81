"""Tied weights: one Parameter under several names (an embedding and its `lm_head`), some of them grafted.

The loader ties Parameters by name after everything is read, so a tied name is never intercepted: it loads as an ordinary
Parameter, the operator packs a copy of it, and then the tie is forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from numagraft.injection import Grafts


def tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Every parameter name that takes part in a tie, sources and targets."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return frozenset(ties) | frozenset(ties.values())


def pack_tied(model: PreTrainedModel, grafts: Grafts) -> None:
    """Packs each tied weight that an operator replaces; the loader has set it as a Parameter by now."""
    tied = tied_names(model)
    for name, (module_name, local) in grafts.owners.items():
        if name in tied:
            operator = grafts.operators[module_name]
            parameter = operator.get_parameter(local)
            if parameter.device.type != "meta":  # else it never came, which the operator reports
                operator.load(local, parameter.detach())


def doubled_elements(model: PreTrainedModel, grafts: Grafts) -> dict[str, int]:
    """Elements by module name that a packed weight repeats, because another name of its tie stays or is packed too."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    seen: set[str] = set()
    doubled: dict[str, int] = {}
    for name, (module_name, local) in grafts.owners.items():
        if name not in ties and name not in ties.values():
            continue
        source = ties.get(name, name)
        group = {source, *(target for target, other in ties.items() if other == source)}
        if source in seen or group - grafts.owners.keys():
            count = grafts.operators[module_name].get_parameter(local).numel()
            doubled[module_name] = doubled.get(module_name, 0) + count
        seen.add(source)
    return doubled


def untie(model: PreTrainedModel, grafts: Grafts) -> None:
    """Forgets the ties that a grafted module took part in, so that nothing ties them again."""
    for prefix, module in model.named_modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if not ties:
            continue
        within = f"{prefix}." if prefix else ""
        kept = {
            target: source
            for target, source in ties.items()
            if within + target not in grafts.owners and within + source not in grafts.owners
        }
        if len(kept) != len(ties):
            module.all_tied_weights_keys = module._tied_weights_keys = kept
