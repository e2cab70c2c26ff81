"""One planning: matches, checks with operators, places in model order, adds up. Imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from numagraft import __version__
from numagraft.contract import Operator, Rejected, Units
from numagraft.errors import ConfigurationError, NumagraftError, PlanError, RuleError
from numagraft.matching import Decision, Matches, Verdict, match
from numagraft.params import build_params
from numagraft.placement import MIRROR_SHARE, PlacementSpec, Placer
from numagraft.planning import Fallback, KeptModule, MadeFor, Plan, PlannedModule
from numagraft.plans.amounts import CPU, device_of, dtype_of, moved_bytes, own_bytes, shapes_of, totals
from numagraft.plans.mirroring import MirrorGains
from numagraft.plans.rates import Load, Rates
from numagraft.registry import operator_class
from numagraft.roles import ModuleInfo
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.requires import check_requires
from numagraft.rulefile.rules import DEFAULT, Rule, RuleSet
from numagraft.runtime import RuntimeLayout
from numagraft.sizes import format_size

if TYPE_CHECKING:
    from numagraft.platform import Platform


@dataclass(frozen=True)
class Usable:
    """A rule's operator and its checked parameters."""

    operator: type[Operator]
    params: Any
    device: str


@dataclass(frozen=True)
class Placed:
    """What one placed module asked: kept so that other policies can be worked out without the model."""

    name: str
    rule: Rule
    module: nn.Module
    usable: Usable
    spec: PlacementSpec
    units: Units


@dataclass(frozen=True)
class Copies:
    """What is known of copies while modules are placed: why `auto` makes them, or why not, and what `mirror` buys anyway."""

    reasons: tuple[str, ...] = ()
    too_little: str = ""
    facts: tuple[str, ...] = ()


class Planner:
    """Problems of rules and of the plan are collected over the whole model and raised together."""

    def __init__(
        self, model: nn.Module, rules: RuleSet, platform: Platform, layout: RuntimeLayout, dtype: torch.dtype | None
    ) -> None:
        self._model = model
        self._rules = rules
        self._platform = platform
        self._layout = layout
        self._dtype = dtype
        self._rule_problems = Problems()
        self._plan_problems = Problems()
        self._usable: dict[str, Usable | None] = {}
        self._rejections: dict[tuple[str, str], list[str]] = {}
        self._rejected: dict[tuple[str, str], str] = {}
        self._kept_because: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self.placed: list[Placed] = []

    def plan(self) -> Plan:
        """Raises RuleError or PlanError."""
        config = getattr(self._model, "config", None)
        check_requires(self._rules, self._platform, getattr(config, "model_type", None), self._plan_problems)
        for rule in self._rules.rules:
            self.prepare(rule)
        matches = match(self._model, self._rules, judge=self.judge, problems=self._rule_problems)
        modules = self._place_as_it_pays(matches)
        fallbacks = self._report_rejections()
        self._raise()
        devices = {module.name: module.device for module in modules}
        kept = self._keep(matches, devices)
        modules = [_moved(module, kept, devices) if module.operator == DEFAULT else module for module in modules]
        sums = totals(modules, kept, len(self._layout.nodes))
        return Plan(
            model_class=type(self._model).__name__,
            source=self._rules.source,
            layout=self._layout,
            modules=tuple(modules),
            kept_bytes=sums.kept_bytes,
            notes=(*self._rules.notes, *self._layout_notes(), *matches.notes),
            fallbacks=tuple(str(fallback) for fallback in fallbacks),
            node_bytes=sums.node_bytes,
            device_bytes=sums.device_bytes,
            kept=tuple(kept),
            bytes_per_token=sums.bytes_per_token,
            made_for=MadeFor(
                numagraft=__version__,
                model_type=getattr(config, "model_type", None) or "",
                dtype=str(self._dtype or dtype_of(self._model)).removeprefix("torch."),
                isa=self._platform.isa,
                shapes=shapes_of(self._model),
            ),
        )

    def _layout_notes(self) -> tuple[str, ...]:
        return tuple(getattr(self._layout, "notes", ()))

    def prepare(self, rule: Rule) -> None:
        """The rule's operator, kwargs and device, checked before any module is looked at."""
        self._usable[rule.id] = None
        if rule.replace.operator == DEFAULT:
            return
        try:
            operator = operator_class(rule.replace.operator)
        except (ConfigurationError, ImportError) as error:
            self._rule_problems.add(rule.mark("replace.class"), str(error))
            return
        params = build_params(operator.Params, rule, self._rule_problems)
        device = rule.replace.device or CPU
        verdict = operator.check_device(device, self._platform)
        if isinstance(verdict, Rejected):
            self._rule_problems.add(
                rule.mark("replace.device"), f"{rule.replace.operator} on {device}: {verdict.reason}", "change the device"
            )
            return
        if params is not None:
            self._usable[rule.id] = Usable(operator, params, device)

    def judge(self, info: ModuleInfo, rule: Rule) -> Verdict:
        """Whether the rule takes the module, gives way, or keeps it: what its operator says of the module."""
        if rule.replace.operator == DEFAULT:
            return "take"
        usable = self._usable[rule.id]
        if usable is None:
            return "take"  # its problem is known; going on finds the others
        params = usable.operator.settled(info.module, usable.params)
        verdict = usable.operator.check(info.module, params, self._platform)
        if not isinstance(verdict, Rejected):
            parent_name, _, attribute = info.name.rpartition(".")
            parent = self._model.get_submodule(parent_name)
            note = verdict.note
            verdict = usable.operator.check_within(parent, attribute)
            note = note or getattr(verdict, "note", "")
            if not isinstance(verdict, Rejected):
                self._notes[info.name] = note
                return "take"
        self._rejections.setdefault((rule.id, verdict.reason), []).append(info.name)
        self._rejected[rule.id, info.name] = verdict.reason
        if rule.on_unavailable == "error":
            return "take"
        if rule.on_unavailable == "keep":
            self._kept_because[info.name] = f"rule {rule.id!r}: {verdict.reason}"
        return rule.on_unavailable

    def _report_rejections(self) -> list[Fallback]:
        fallbacks = []
        for (rule_id, reason), names in self._rejections.items():
            rule = self._rules.rule(rule_id)
            if rule.on_unavailable != "error":
                fallbacks.append(Fallback(rule_id, rule.location, rule.on_unavailable, reason, tuple(names)))
                continue
            shown = ", ".join(names[:3]) + (f", ... ({len(names):,} modules)" if len(names) > 3 else "")
            self._plan_problems.add(
                rule.location,
                f"rule {rule_id!r}: {rule.replace.operator} cannot replace {shown}: {reason}",
                "narrow the rule, or say what to do: on_unavailable: next (try later rules) or keep (leave it to torch)",
            )
        return fallbacks

    def _place_as_it_pays(self, matches: Matches) -> list[PlannedModule]:
        """Places without copies first: what a copy buys hangs on all that is read. Then again where `auto` or `mirror` asks
        for the answer: all modules of `auto` are mirrored or none, since one that is sharded needs every node again."""
        modules = self._place(matches, Copies())
        asking = [each for each in self.placed if each.spec.policy in ("auto", "mirror")]
        if self._plan_problems or len(self._layout.compute_nodes) < 2 or not asking:
            return modules
        load = Load.of(modules)
        if not load.bytes:
            return modules
        gains = MirrorGains.of(Rates.of(self._layout, self._platform), load)
        chosen = Copies(gains.reasons(), gains.too_little(), gains.facts())
        modules = self._place(matches, chosen)
        wanted = {each.name: each for each in asking if each.spec.policy == "auto" and each.spec.budget is None}
        sharded = {m.name for m in modules if m.placement is not None and m.placement.policy == "shard"}
        if not chosen.reasons or not sharded & set(wanted):
            return modules
        return self._place(matches, Copies((), self._no_room(wanted.values(), gains), gains.facts()))

    def _no_room(self, wanted: Iterable[Placed], gains: MirrorGains) -> str:
        """Why not every module that `auto` would mirror can have a copy per node, with the figures."""
        copies = sum(each.units.packed_bytes for each in wanted)
        bought = ", ".join(gains.reasons()[:-1])
        nodes = self._layout.nodes
        tight = min(self._layout.compute_nodes, key=lambda index: nodes[index].free_bytes)
        os_node = nodes[tight].os_node
        return (
            f"a copy on each of {gains.nodes} nodes takes {format_size(copies)} per node, {MIRROR_SHARE:.0%} of what is "
            f"free on node {tight if os_node is None else os_node} is "
            f"{format_size(int(MIRROR_SHARE * nodes[tight].free_bytes))}; it would have bought: {bought}"
        )

    def _place(self, matches: Matches, copies: Copies) -> list[PlannedModule]:
        self.placed = []
        placer = Placer(self._layout)
        failed: set[str] = set()
        modules = []
        for decision in matches.decisions:
            rule = decision.rule
            if rule is None:
                continue
            info = decision.info
            if rule.replace.operator == DEFAULT:
                if rule.replace.device is not None:
                    modules.append(_planned(info, rule, rule.replace.device, None, None, {}, {}, 0, "kept"))
                continue
            usable = self._usable[rule.id]
            if usable is None or (rule.id in failed) or self.rejection(rule, info.name):
                continue
            try:
                modules.append(self._place_one(decision, rule, usable, placer, copies))
            except NumagraftError as error:
                failed.add(rule.id)
                place = rule.mark("replace.kwargs.placement")
                details = error.problems or ()
                for problem in details:
                    self._plan_problems.add(place, f"{problem.message}", problem.hint)
                if not details:
                    self._plan_problems.add(place, str(error))
        return modules

    def rejection(self, rule: Rule, name: str) -> str:
        """Why the rule's operator rejected the module, or ""."""
        return self._rejected.get((rule.id, name), "")

    def _place_one(
        self, decision: Decision, rule: Rule, usable: Usable, placer: Placer, copies: Copies
    ) -> PlannedModule:
        info = decision.info
        usable = dataclasses.replace(usable, params=usable.operator.settled(info.module, usable.params))
        units = usable.operator.units(info.module, usable.params)
        placement = None
        if units is not None:
            spec = getattr(usable.params, "placement", PlacementSpec())
            reasons = copies.facts if spec.policy == "mirror" else copies.reasons
            placement = placer.place(rule.id, spec, units, mirror_gains=reasons, no_gain=copies.too_little)
            self.placed.append(Placed(info.name, rule, info.module, usable, spec, units))
        footprint = usable.operator.footprint(info.module, usable.params, placement, usable.device)
        note = self._notes.get(info.name, "")
        made = _planned(
            info,
            rule,
            usable.device,
            usable.params,
            placement,
            footprint.node_bytes,
            footprint.device_bytes,
            footprint.bytes_per_token,
            note,
        )
        return dataclasses.replace(made, added_per_token=footprint.added_per_token)

    def _keep(self, matches: Matches, devices: Mapping[str, str]) -> list[KeptModule]:
        """Modules that keep parameters or buffers, and the bytes that they hold; tied ones count once."""
        seen: set[int] = set()
        kept: list[KeptModule] = []
        root = Decision(ModuleInfo("", self._model, None, None, "text"))
        for decision in (root, *matches.decisions):
            if decision.owner is not None or decision.replaced:
                continue
            info = decision.info
            amount = own_bytes(info.module, seen, self._dtype)
            if amount:
                why = self._why_kept(decision)
                device = device_of(info.name, devices)
                kept.append(KeptModule(info.name, info.class_name, info.role or "", device, amount, why))
        return kept

    def _why_kept(self, decision: Decision) -> str:
        if decision.rule is not None:
            return f"rule {decision.rule.id!r} keeps it"
        if decision.stopped_by is not None:
            return f"below {decision.stopped_by}, which is kept with `recursive: false`"
        return self._kept_because.get(decision.info.name, "no rule matches")

    def _raise(self) -> None:
        subject = f"{self._rules.source} on {type(self._model).__name__}"
        if self._plan_problems:
            self._plan_problems.absorb(self._rule_problems)
            self._plan_problems.raise_if_any(subject, PlanError)
        self._rule_problems.raise_if_any(subject, RuleError)


def _planned(
    info: ModuleInfo,
    rule: Rule,
    device: str,
    params: Any,
    placement: Any,
    node_bytes: Mapping[int, int],
    device_bytes: Mapping[str, int],
    bytes_per_token: int,
    note: str,
) -> PlannedModule:
    return PlannedModule(
        name=info.name,
        class_name=info.class_name,
        role=info.role or "",
        rule_id=rule.id,
        location=rule.location,
        operator=rule.replace.operator,
        device=device,
        params=params,
        placement=placement,
        node_bytes=dict(node_bytes),
        device_bytes=dict(device_bytes),
        bytes_per_token=bytes_per_token,
        note=note,
    )


def _moved(module: PlannedModule, kept: list[KeptModule], devices: Mapping[str, str]) -> PlannedModule:
    """A kept and moved module with the bytes that move with it."""
    total = moved_bytes(module.name, kept, devices)
    return dataclasses.replace(module, device_bytes={module.device: total} if total else {})
