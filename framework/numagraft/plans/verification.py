"""A saved plan held against the model and the machine that it is to be carried out on. Pure; imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from numagraft import __version__
from numagraft.contract import Operator, Rejected
from numagraft.errors import PlanError, Problem
from numagraft.placement import Placement
from numagraft.planning import KeptModule, Plan, PlannedModule
from numagraft.plans.amounts import device_of, dtype_of, moved_bytes, own_bytes, shapes_of, totals
from numagraft.plans.fitting import device_shortages, shortages
from numagraft.plans.table import group_names
from numagraft.platform.ids import format_list
from numagraft.registry import operator_class
from numagraft.rulefile.rules import DEFAULT
from numagraft.runtime import RuntimeLayout

if TYPE_CHECKING:
    from numagraft.platform import Platform

_SHOWN = 60
_AGAIN = "plan again here: numagraft plan MODEL --rules RULES"


def fit_to(
    plan: Plan, model: nn.Module, platform: Platform, *, layout: RuntimeLayout | None = None, source: str = "the plan"
) -> Plan:
    """`plan` as it is, with what is free on this machine now, once everything it says holds for `model` and `platform`.

    `model` is on meta. `layout` is for plans of virtual layouts, which no machine has. `source` names the plan in errors.

    Raises PlanError naming everything that differs: versions, the model's class, dtype, parameters, modules and shapes;
    nodes, CPUs, instruction sets and devices; operators that do not take a module; placements and bytes that are not what the
    operators of this version make of them; memory that does not suffice.
    """
    problems = [
        *_versions(plan),
        *_model(plan, model),
        *_instruction_set(plan, platform),
        *_nodes(plan.layout, platform, layout),
    ]
    if not problems:  # what follows would only repeat it, module by module
        problems = [*_modules(plan, model, platform), *_kept(plan, model), *_sums(plan)]
    today = plan
    if not problems:
        today = replace(plan, layout=_today(plan.layout, platform, layout))
        short = [*shortages(today.layout, plan.node_bytes, plan.kept_bytes, platform)]
        short += device_shortages(plan.device_bytes, platform)
        problems = [Problem("memory", text, f"free it, or {_AGAIN}") for text in short]
    if not problems:
        return today
    shown = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        shown.append(Problem("", f"and {len(problems) - _SHOWN} more"))
    raise PlanError(f"{source} (of {plan.source} on {plan.model_class}) does not hold here", shown)


def _versions(plan: Plan) -> Iterable[Problem]:
    found = plan.made_for.numagraft
    if found != __version__:
        yield Problem(
            "numagraft", f"the plan was made by {found or 'an unknown version'}, this is {__version__}", _AGAIN
        )


def _model(plan: Plan, model: nn.Module) -> list[Problem]:
    """The model's class and configuration, then its parameters by name and shape: those of one kind in one line."""
    made = plan.made_for
    config = getattr(model, "config", None)
    facts = (
        ("model class", plan.model_class, type(model).__name__),
        ("model_type", made.model_type, getattr(config, "model_type", None) or ""),
        ("dtype", made.dtype, dtype_of(model)),
    )
    hint = "give the model that was planned for, or plan for this one"
    problems = [
        Problem(what, f"the plan is for {planned or 'none'}, the model has {found or 'none'}", hint)
        for what, planned, found in facts
        if planned != found
    ]
    found = shapes_of(model)
    differences: dict[str, list[str]] = {}
    for name in {**made.shapes, **found}:
        if name not in found:
            differences.setdefault("is in the plan, but not in the model", []).append(name)
        elif name not in made.shapes:
            differences.setdefault("is in the model, but not in the plan", []).append(name)
        elif made.shapes[name] != found[name]:
            text = f"has the shape {list(found[name])} in the model; the plan is for {list(made.shapes[name])}"
            differences.setdefault(text, []).append(name)
    return problems + [Problem(group, text) for text, names in differences.items() for group in group_names(names)]


def _instruction_set(plan: Plan, platform: Platform) -> Iterable[Problem]:
    made = plan.made_for.isa
    if made != platform.isa:
        text = f"the plan is for a CPU with {', '.join(made) or 'none'}; this one runs {', '.join(platform.isa)}"
        yield Problem("instruction set", text, "packed weights are laid out for it: plan again for this CPU")


def _nodes(layout: RuntimeLayout, platform: Platform, given: RuntimeLayout | None) -> Iterable[Problem]:
    """Nodes, CPUs and threads of the plan against those that this process may use."""
    if given is not None:
        if _essence(layout) != _essence(given):
            yield Problem(
                "runtime", "the plan was made for another layout than the one given", "give the one it was made for"
            )
        return
    usable = {*platform.usable_nodes, *platform.memory_only_nodes}
    where = {cpu: node.id for node in platform.nodes for cpu in node.cpus}
    if not layout.nodes:
        yield Problem("nodes", "the plan has none")
    for index, node in enumerate(layout.nodes):
        place = f"node {node.os_node}"
        if node.os_node is None:
            yield Problem(f"nodes[{index}]", "is virtual: no machine has it", "give the same RuntimeLayout as runtime=")
            continue
        if [each.os_node for each in layout.nodes].index(node.os_node) != index:
            yield Problem(place, "is in the plan twice")
        if node.os_node not in usable:
            have = format_list(sorted(usable)) or "none"
            yield Problem(place, "is not there, or this process may not use it", f"usable nodes: {have}")
            continue
        strange = [cpu for cpu in node.cpus if cpu not in platform.allowed_cpus]
        if strange:
            allowed = f"allowed CPUs: {format_list(platform.allowed_cpus)}"
            yield Problem(
                place, f"its CPUs {format_list(strange)} are not there, or not allowed to this process", allowed
            )
        elsewhere = [cpu for cpu in node.cpus if cpu not in strange and where.get(cpu, node.os_node) != node.os_node]
        if elsewhere and len(layout.nodes) > 1:
            yield Problem(place, f"CPUs {format_list(elsewhere)} belong to another node here", _AGAIN)
        if not 0 <= node.threads <= len(node.cpus):
            yield Problem(place, f"has {node.threads} threads for {len(node.cpus)} CPUs")
    if not any(node.threads > 0 for node in layout.nodes):
        yield Problem("nodes", "none of the plan's nodes has threads")
    if layout.nodes and len(layout.distances) not in (0, len(layout.nodes)):
        yield Problem("distances", f"has {len(layout.distances)} rows for {len(layout.nodes)} nodes")


def _essence(layout: RuntimeLayout) -> RuntimeLayout:
    """What makes two layouts the same: free memory is another every second."""
    nodes = tuple(replace(node, free_bytes=0, total_bytes=0) for node in layout.nodes)
    return replace(layout, nodes=nodes, notes=())


def _today(layout: RuntimeLayout, platform: Platform, given: RuntimeLayout | None) -> RuntimeLayout:
    """The plan's layout with what is free now; bound where the platform is this machine."""
    if given is not None:
        return given
    free = platform.available_bytes()
    total = {node.id: node.total_bytes for node in platform.nodes}
    nodes = tuple(
        replace(node, free_bytes=free.get(node.os_node, 0), total_bytes=total.get(node.os_node, 0))
        for node in layout.nodes
    )
    return replace(layout, nodes=nodes, bound=platform.live)


def _modules(plan: Plan, model: nn.Module, platform: Platform) -> Iterable[Problem]:
    """Every planned module: there, of its class, taken by its operator, placed and counted as that operator would."""
    modules = dict(model.named_modules())
    replaced = {each.name for each in plan.modules if each.operator != DEFAULT}
    seen: set[str] = set()
    for each in plan.modules:
        if each.name in seen:
            yield Problem(each.name, "is in the plan twice")
            continue
        seen.add(each.name)
        owner = _owner(each.name, replaced)
        if owner:
            yield Problem(each.name, f"lies in {owner}, which the plan replaces as a whole")
        module = modules.get(each.name)
        if module is None:
            yield Problem(each.name, "is in the plan, but not in the model")
        elif type(module).__name__ != each.class_name:
            yield Problem(each.name, f"is a {type(module).__name__}; the plan is for a {each.class_name}")
        elif each.operator == DEFAULT:
            verdict = Operator.check_device(each.device, platform)
            if isinstance(verdict, Rejected):
                yield Problem(each.name, verdict.reason)
            elif each.device_bytes != _moved(each, plan):
                yield Problem(each.name, f"says that {dict(each.device_bytes)} move, but it is {_moved(each, plan)}")
        else:
            yield from _replacement(each, module, model, platform, plan.layout)


def _owner(name: str, replaced: set[str]) -> str:
    name = name.rpartition(".")[0]
    while name and name not in replaced:
        name = name.rpartition(".")[0]
    return name


def _moved(each: PlannedModule, plan: Plan) -> dict[str, int]:
    total = moved_bytes(each.name, plan.kept, {module.name: module.device for module in plan.modules})
    return {each.device: total} if total else {}


def _replacement(
    each: PlannedModule, module: nn.Module, model: nn.Module, platform: Platform, layout: RuntimeLayout
) -> Iterable[Problem]:
    operator = operator_class(each.operator)
    parent, _, attribute = each.name.rpartition(".")
    for verdict in (
        operator.check_device(each.device, platform),
        operator.check(module, each.params, platform),
        operator.check_within(model.get_submodule(parent), attribute),
    ):
        if isinstance(verdict, Rejected):
            yield Problem(each.name, f"{each.operator} cannot replace it: {verdict.reason}")
            return
    units = operator.units(module, each.params)
    if (units is None) != (each.placement is None):
        yield Problem(each.name, f"{each.operator} {'needs a' if units else 'takes no'} placement")
        return
    if units is not None and each.placement is not None:
        wrong = _misfit(each.placement, units.count, units.multiple, layout)
        if wrong:
            yield Problem(each.name, f"its placement {wrong}")
            return
    made = operator.footprint(module, each.params, each.placement, each.device)
    for what, planned, found in (
        ("bytes by node", each.node_bytes, made.node_bytes),
        ("bytes by device", each.device_bytes, made.device_bytes),
        ("bytes per token", each.bytes_per_token, made.bytes_per_token),
    ):
        if planned != found:
            yield Problem(each.name, f"takes {_plain(found)} {what}, but the plan says {_plain(planned)}", _AGAIN)


def _plain(amount: object) -> object:
    return dict(amount) if isinstance(amount, Mapping) else amount


def _misfit(placement: Placement, count: int, multiple: int, layout: RuntimeLayout) -> str:
    """What is wrong with a placement of `count` units, or "": each part on nodes there are, every unit held."""
    if not placement.parts:
        return "has no parts"
    held = []
    for part in placement.parts:
        nodes = (*part.memory_nodes, *part.worker_nodes)
        strange = sorted({node for node in nodes if not 0 <= node < len(layout.nodes)})
        if strange or not part.memory_nodes or not part.worker_nodes:
            return (
                f"names nodes {format_list(strange)}, which the plan does not have"
                if strange
                else "has a part on no node"
            )
        idle = [node for node in part.worker_nodes if layout.nodes[node].threads < 1]
        if idle:
            return f"lets nodes {format_list(idle)} compute, which have no threads"
        if len(set(part.memory_nodes)) != len(part.memory_nodes):
            return "names a node twice"
        if (
            not 0 <= part.begin < part.end <= count
            or part.begin % multiple
            or (part.end % multiple and part.end != count)
        ):
            return f"has a part [{part.begin}, {part.end}) of {count:,} units in blocks of {multiple}"
        held.append((part.begin, part.end))
    ranges = sorted(set(held))
    if placement.policy == "auto":
        return "is auto: a plan says which policy that means"
    whole = ranges[0][0] == 0 and ranges[-1][1] == count and _touching(ranges)
    if not whole:
        return f"holds units {ranges} of {count:,}: not each of them once"
    if len(held) != len(ranges) and (placement.policy != "mirror" or ranges != [(0, count)]):
        return f"holds units {held} of {count:,}: not each of them once"
    return ""


def _touching(ranges: Sequence[tuple[int, int]]) -> bool:
    return all(before[1] == after[0] for before, after in pairwise(ranges))


def _kept(plan: Plan, model: nn.Module) -> Iterable[Problem]:
    """What stays in torch tensors: the same modules, with the same bytes, on the devices that the plan's modules say."""
    replaced = {each.name for each in plan.modules if each.operator != DEFAULT}
    devices = {each.name: each.device for each in plan.modules}
    planned: dict[str, KeptModule] = {each.name: each for each in plan.kept}
    seen: set[int] = set()
    found: set[str] = set()
    for name, module in model.named_modules():
        if name in replaced or _owner(name, replaced):
            continue
        amount = own_bytes(module, seen)
        if not amount:
            continue
        found.add(name)
        each = planned.get(name)
        if each is None:
            yield Problem(name or "the model", f"keeps {amount:,} bytes of torch tensors, which the plan does not list")
        elif (each.class_name, each.bytes, each.device) != (type(module).__name__, amount, device_of(name, devices)):
            yield Problem(
                name or "the model",
                f"is a {type(module).__name__} that keeps {amount:,} bytes on {device_of(name, devices)}; the plan says "
                f"{each.class_name}, {each.bytes:,} bytes on {each.device}",
            )
    for name in sorted(planned.keys() - found):
        yield Problem(name, "is kept by the plan, but keeps nothing in the model")


def _sums(plan: Plan) -> Iterable[Problem]:
    sums = totals(plan.modules, plan.kept, len(plan.layout.nodes))
    for what, planned, found in (
        ("node_bytes", dict(plan.node_bytes), dict(sums.node_bytes)),
        ("device_bytes", dict(plan.device_bytes), dict(sums.device_bytes)),
        ("kept_bytes", plan.kept_bytes, sums.kept_bytes),
        ("bytes_per_token", plan.bytes_per_token, sums.bytes_per_token),
    ):
        if planned != found:
            yield Problem(what, f"is {planned} in the plan, but its modules add up to {found}")
