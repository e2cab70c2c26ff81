"""Why one module is what it is in a plan: every rule, condition by condition. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from numagraft.errors import ConfigurationError
from numagraft.matching import Decision, is_class, match, measure, where_holds
from numagraft.plans.planner import Planner
from numagraft.roles import ModuleInfo, survey
from numagraft.rulefile.pattern import NamePattern, PatternTimeout
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.resolved import ranges
from numagraft.rulefile.rules import DEFAULT, Location, Rule, RuleSet
from numagraft.runtime import RuntimeLayout

if TYPE_CHECKING:
    from numagraft.platform import Platform


@dataclass(frozen=True)
class Condition:
    """One condition of a rule, as written, whether it holds for the module, and what was found there."""

    text: str
    holds: bool
    found: str


@dataclass(frozen=True)
class RuleVerdict:
    """What one rule has to do with the module: `outcome` says it in words."""

    rule_id: str
    location: Location
    conditions: tuple[Condition, ...]
    outcome: str

    @property
    def matches(self) -> bool:
        return all(condition.holds for condition in self.conditions)


@dataclass(frozen=True)
class Explanation:
    """One module, every rule in the order in which it is tried, and what came of it."""

    name: str
    class_name: str
    role: str
    layer: int | None
    tower: str
    verdicts: tuple[RuleVerdict, ...]
    decision: str


def explain(model: nn.Module, rules: RuleSet, platform: Platform, name: str) -> Explanation:
    """Raises ConfigurationError with the closest names when the model has no module `name`."""
    infos = survey(model)
    info = next((info for info in infos if info.name == name), None)
    if info is None:
        hint = did_you_mean(name, [info.name for info in infos], otherwise="names")
        raise ConfigurationError(f"{type(model).__name__} has no module {name!r}; {hint}")
    layout = RuntimeLayout.from_platform(platform, rules.runtime)
    planner = Planner(model, rules, platform, layout, None)
    for rule in rules.rules:
        planner.prepare(rule)
    matches = match(model, rules, judge=planner.judge, problems=Problems())
    decision = next(decision for decision in matches.decisions if decision.info.name == name)
    verdicts = []
    decided = False
    for rule in rules.rules:
        conditions = conditions_of(info, rule)
        holds = all(condition.holds for condition in conditions)
        if not holds:
            outcome = "does not match"
        elif decision.owner is not None:
            outcome = f"matches, but {decision.owner} is replaced as a whole"
        elif decision.stopped_by is not None:
            outcome = f"matches, but {decision.stopped_by} is kept with `recursive: false`"
        elif decided:
            outcome = f"matches, but rule {decision.rule.id!r} came first" if decision.rule else "matches, but came later"
        elif decision.rule is rule:
            decided = True
            outcome = _outcome(info, rule, planner)
        else:
            reason = planner.rejection(rule, info.name)
            outcome = f"matches, but {rule.replace.operator} cannot: {reason} (on_unavailable: {rule.on_unavailable})"
            decided = decided or rule.on_unavailable == "keep"
        verdicts.append(RuleVerdict(rule.id, rule.location, conditions, outcome))
    return Explanation(
        name=name,
        class_name=info.class_name,
        role=info.role or "",
        layer=info.layer,
        tower=info.tower,
        verdicts=tuple(verdicts),
        decision=_decision(decision, planner),
    )


def _outcome(info: ModuleInfo, rule: Rule, planner: Planner) -> str:
    if rule.replace.operator == DEFAULT:
        return "decides: kept" + (f" on {rule.replace.device}" if rule.replace.device else "")
    reason = planner.rejection(rule, info.name)
    if reason:
        return f"matches, but {rule.replace.operator} cannot: {reason}; an error unless on_unavailable says otherwise"
    return f"decides: replaced by {rule.replace.operator} on {rule.replace.device or 'cpu'}"


def _decision(decision: Decision, planner: Planner) -> str:
    if decision.owner is not None:
        return f"goes with {decision.owner}, which is replaced as a whole"
    if decision.stopped_by is not None:
        return f"kept: below {decision.stopped_by}, where `recursive: false` ends the walk"
    if decision.rule is None:
        return "kept: no rule decides it"
    return f"rule {decision.rule.id!r} {_outcome(decision.info, decision.rule, planner).removeprefix('decides: ')}"


def conditions_of(info: ModuleInfo, rule: Rule) -> tuple[Condition, ...]:
    """Every condition that the rule gives, with what the module shows."""
    given = rule.match
    found = []
    if given.name is not None:
        found.append(_name(info.name, given.name))
    if given.class_name is not None:
        bases = [cls.__name__ for cls in type(info.module).__mro__ if cls.__name__ not in ("Module", "object")]
        found.append(
            Condition(f"class: {given.class_name}", is_class(type(info.module), given.class_name), " < ".join(bases))
        )
    if given.role is not None:
        found.append(Condition(f"role: {given.role}", info.role == given.role, info.role or "no role"))
    if given.layers is not None:
        layer = "in no layer" if info.layer is None else f"layer {info.layer}"
        found.append(Condition(f"layers: {ranges(given.layers)}", info.layer in given.layers, layer))
    for key, text in given.where.items():
        value: Any = measure(info.module, key)
        shown = "does not apply" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:,}"
        found.append(Condition(f"where: {key} {text}", where_holds(info.module, {key: text}), shown))
    if given.tower != "text" or info.tower != "text":
        found.append(Condition(f"tower: {given.tower}", given.tower in ("any", info.tower), info.tower))
    return tuple(found)


def _name(name: str, text: str) -> Condition:
    pattern = NamePattern.compile(text)
    try:
        if pattern.fullmatch(name):
            return Condition(f"name: {text}", True, "the whole name matches")
        if pattern.search(name, timeout=0.1):
            return Condition(f"name: {text}", False, "only a part of the name matches; names are matched whole")
    except PatternTimeout:
        return Condition(f"name: {text}", False, "the pattern takes too long")
    return Condition(f"name: {text}", False, "does not match the name")


__all__ = ["Condition", "Explanation", "RuleVerdict", "conditions_of", "explain"]
