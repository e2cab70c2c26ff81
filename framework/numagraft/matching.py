"""Which rule decides which module: pure, nothing is changed. Imports torch.

The walk is in pre-order; the first rule whose conditions hold decides a module; a replaced module owns its subtree. Every
rule is also counted over all modules, whoever took them: that is what `expect` means, and how shadowing is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import nn

from numagraft.roles import ModuleInfo, count_experts, survey
from numagraft.rulefile.comparison import Comparison
from numagraft.rulefile.pattern import NamePattern, Names, PatternTimeout
from numagraft.rulefile.problems import Problems, did_you_mean
from numagraft.rulefile.rules import DEFAULT, Location, Rule, RuleSet

Verdict = Literal["take", "next", "keep"]

Judge = Callable[[ModuleInfo, Rule], Verdict]
"""Whether a rule whose conditions hold takes the module, gives way to later rules, or keeps the module as it is."""


@dataclass(frozen=True)
class Decision:
    """What happens to one module: `rule` decided it; `owner` is the replaced ancestor that took it along."""

    info: ModuleInfo
    rule: Rule | None = None
    owner: str | None = None
    stopped_by: str | None = None  # the kept ancestor whose rule says `recursive: false`

    @property
    def replaced(self) -> bool:
        return self.rule is not None and self.rule.replace.operator != DEFAULT


@dataclass(frozen=True)
class Matches:
    """Every module's decision in pre-order, and per rule what satisfied its conditions and what it decided."""

    decisions: tuple[Decision, ...]
    satisfied: Mapping[str, tuple[str, ...]]
    decided: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    names: Names = field(default_factory=lambda: Names.of(()), repr=False)


def match(model: nn.Module, rules: RuleSet, *, judge: Judge | None = None, problems: Problems | None = None) -> Matches:
    """Applies `rules` to `model`'s modules. `judge` may let a rule give way (an operator rejected the module).

    Raises RuleError for rules that match nothing, counts that differ from `expect`, shadowed rules and patterns that take
    too long, unless `problems` is given to collect them.
    """
    own = Problems() if problems is None else problems
    infos = survey(model)
    conditions = satisfying(infos, rules.rules, own)
    decisions, decided, gave_way = _walk(infos, rules.rules, conditions, judge)
    satisfied = {rule.id: tuple(infos[i].name for i in sorted(conditions[rule.id])) for rule in rules.rules}
    notes = _check_counts(rules.rules, satisfied, decided, gave_way, infos, own)
    if problems is None:
        own.raise_if_any(f"{rules.source} on {type(model).__name__}")
    return Matches(tuple(decisions), satisfied, {id_: tuple(names) for id_, names in decided.items()}, tuple(notes))


def satisfying(infos: Sequence[ModuleInfo], rules: Sequence[Rule], problems: Problems) -> dict[str, set[int]]:
    """Rule id -> indices of the modules that satisfy all its conditions. A pattern that takes too long ends the scans."""
    names = Names.of([info.name for info in infos])
    by_role: dict[str | None, set[int]] = {}
    by_tower: dict[str, set[int]] = {}
    by_class: dict[type, set[int]] = {}
    for index, info in enumerate(infos):
        by_role.setdefault(info.role, set()).add(index)
        by_tower.setdefault(info.tower, set()).add(index)
        by_class.setdefault(type(info.module), set()).add(index)
    found: dict[str, set[int]] = {}
    timed_out = False
    for rule in rules:
        condition = rule.match
        left = set(range(len(infos))) if condition.tower == "any" else set(by_tower.get(condition.tower, ()))
        if condition.role is not None:
            left &= by_role.get(condition.role, set())
        if condition.class_name is not None:
            fitting = (indices for cls, indices in by_class.items() if is_class(cls, condition.class_name))
            left &= set().union(*fitting)
        if condition.layers is not None:
            left = {index for index in left if infos[index].layer in condition.layers}
        if condition.where:
            left = {index for index in left if where_holds(infos[index].module, condition.where)}
        if condition.name is not None and left:
            pattern = NamePattern.compile(condition.name)
            some = names if len(left) == len(infos) else None
            order = sorted(left)
            try:
                if timed_out:
                    left = set()
                elif some is not None:
                    left = set(pattern.scan(some))
                else:
                    left = {order[i] for i in pattern.scan(Names.of([names.names[i] for i in order]))}
            except PatternTimeout:
                timed_out = True
                problems.add(
                    rule.mark("match.name"),
                    f"the pattern {condition.name!r} takes too long over {len(order):,} names",
                    "nested repeats such as (a+)+ explode: write it without them",
                )
                left = set()
        found[rule.id] = left
    return found


def _walk(
    infos: Sequence[ModuleInfo], rules: Sequence[Rule], conditions: Mapping[str, set[int]], judge: Judge | None
) -> tuple[list[Decision], dict[str, list[str]], set[str]]:
    candidates: dict[int, list[Rule]] = {}
    for rule in rules:
        for index in conditions[rule.id]:
            candidates.setdefault(index, []).append(rule)
    decided: dict[str, list[str]] = {rule.id: [] for rule in rules}
    gave_way: set[str] = set()
    decisions = []
    owner: str | None = None
    stopper: str | None = None
    for index, info in enumerate(infos):
        if owner is not None:
            if info.name.startswith(f"{owner}."):
                decisions.append(Decision(info, owner=owner))
                continue
            owner = None
        if stopper is not None:
            if info.name.startswith(f"{stopper}."):
                decisions.append(Decision(info, stopped_by=stopper))
                continue
            stopper = None
        chosen: Rule | None = None
        for rule in candidates.get(index, ()):
            verdict: Verdict = "take" if judge is None else judge(info, rule)
            if verdict == "take":
                chosen = rule
                break
            gave_way.add(rule.id)
            if verdict == "keep":
                break
        decision = Decision(info, chosen)
        decisions.append(decision)
        if chosen is not None:
            decided[chosen.id].append(info.name)
            if decision.replaced:
                owner = info.name
            elif not chosen.recursive:
                stopper = info.name
    return decisions, decided, gave_way


def _check_counts(
    rules: Sequence[Rule],
    satisfied: Mapping[str, tuple[str, ...]],
    decided: Mapping[str, list[str]],
    gave_way: set[str],
    infos: Sequence[ModuleInfo],
    problems: Problems,
) -> list[str]:
    notes = []
    for position, rule in enumerate(rules):
        count = len(satisfied[rule.id])
        if not count:
            if not rule.optional:
                problems.add(rule.location, f"rule {rule.id!r} matches nothing", why_nothing(rule, infos))
            continue
        if rule.expect is not None:
            expected = Comparison.parse(rule.expect)
            assert expected is not None
            if not expected.holds(count):
                problems.add(
                    rule.mark("expect"),
                    f"rule {rule.id!r} matches {count:,} modules, expected {rule.expect}",
                    f"the first: {', '.join(satisfied[rule.id][:3])}",
                )
        if not decided[rule.id] and rule.id not in gave_way:
            mine = set(satisfied[rule.id])
            takers = [other for other in rules[:position] if mine & _taken(decided[other.id], mine)]
            takers += [other for other in rules[position + 1 :] if mine & _below(decided[other.id], mine)]
            by = " and ".join(repr(other.id) for other in takers)
            keepers = [other for other in rules[:position] if other.on_unavailable == "keep"]
            keepers = [repr(other.id) for other in keepers if mine & set(satisfied[other.id])]
            if not by and keepers:
                by = " and ".join(keepers) + ", or kept by its `on_unavailable: keep`"
            by = by or "a kept module with `recursive: false`"
            text = f"rule {rule.id!r} is shadowed: everything that it matches is taken by {by}"
            if rule.inherited or rule.optional:
                notes.append(f"{rule.location}: {text}")
            else:
                problems.add(rule.location, text, "put it before that rule, make it narrower, or remove it")
    return notes


def _taken(names: Sequence[str], wanted: set[str]) -> set[str]:
    """Of `wanted`, what the modules `names` are or hold."""
    return (set(names) & wanted) | _below(names, wanted)


def _below(names: Sequence[str], wanted: set[str]) -> set[str]:
    owners = set(names)
    found = set()
    for name in wanted:
        parent = name.rpartition(".")[0]
        while parent:
            if parent in owners:
                found.add(name)
                break
            parent = parent.rpartition(".")[0]
    return found


def why_nothing(rule: Rule, infos: Sequence[ModuleInfo]) -> str:
    """Which condition fails first, and the closest thing there is: the hint of a rule without matches."""
    condition = rule.match
    left = [info for info in infos if condition.tower in ("any", info.tower)]
    if not left:
        towers = sorted({info.tower for info in infos})
        return f"the model has no {condition.tower} tower (it has {', '.join(towers)})"
    if condition.role is not None:
        there = sorted({info.role for info in left if info.role})
        left = [info for info in left if info.role == condition.role]
        if not left:
            return f"no module has the role {condition.role}; roles here: {', '.join(there)}; or add `optional: true`"
    if condition.class_name is not None:
        classes = {cls.__name__ for info in left for cls in type(info.module).__mro__[:-2]}
        left = [info for info in left if is_class(type(info.module), condition.class_name)]
        if not left:
            hint = did_you_mean(condition.class_name.rpartition(".")[2], classes, otherwise="classes")
            return f"no {'such ' if condition.role else ''}module is a {condition.class_name}; {hint}"
    if condition.layers is not None:
        there_layers = sorted({info.layer for info in left if info.layer is not None})
        left = [info for info in left if info.layer in condition.layers]
        if not left:
            have = f"layers {there_layers[0]}-{there_layers[-1]}" if there_layers else "no layers"
            return f"nothing of that is in these layers; there {'are' if there_layers else 'is'} {have}"
    if condition.where:
        left = [info for info in left if where_holds(info.module, condition.where)]
        if not left:
            return f"no module satisfies where {dict(condition.where)}"
    if condition.name is not None:
        return _closest_name(condition.name, left)
    return ""


def _closest_name(pattern: str, infos: Sequence[ModuleInfo]) -> str:
    """What a pattern without matches may have meant: it matches part of a name, or looks like one."""
    compiled = NamePattern.compile(pattern)
    try:
        parts = [info.name for info in infos if compiled.search(info.name, timeout=0.05)]
    except PatternTimeout:
        parts = []
    if parts:
        return f"it matches a part of {len(parts):,} names, such as {parts[0]!r}: names are matched whole, add '.*'"
    literal = pattern.replace("\\", "").replace("d+", "0").replace(".*", "")
    last = literal.rpartition(".")[2]
    alike = [info.name for info in infos if info.name.rpartition(".")[2] == last]
    if alike:
        return f"did you mean {alike[0]!r}? {len(alike):,} module{'s' if len(alike) > 1 else ''} end in {last!r}"
    hint = did_you_mean(literal, [info.name for info in infos], otherwise="names")
    return hint if hint.startswith("did") else f"names look like {infos[-1].name!r}" if infos else ""


@cache
def is_class(cls: type, name: str) -> bool:
    """Whether `cls` or a base is called `name`: a class name, or a dotted path (its module's, or a package's above it)."""
    path, _, last = name.rpartition(".")
    for base in cls.__mro__:
        if base is object or base.__qualname__ != last:
            continue
        if not path or base.__module__ == path or base.__module__.startswith(f"{path}."):
            return True
    return False


def where_holds(module: nn.Module, where: Mapping[str, str]) -> bool:
    """Whether every condition on shapes holds; one that does not apply to the module does not hold."""
    for key, text in where.items():
        value = measure(module, key)
        if value is None:
            return False
        if isinstance(value, bool):
            if value != (text == "true"):
                return False
            continue
        expected = Comparison.parse(text)
        if expected is None or not expected.holds(value):
            return False
    return True


def measure(module: nn.Module, key: str) -> int | bool | None:
    """What `where` compares; None where it does not apply."""
    if key == "parameters":
        return sum(parameter.numel() for parameter in module.parameters())
    if key == "bias":
        return module._parameters.get("bias") is not None if "weight" in module._parameters else None
    if key in ("in_features", "out_features"):
        value: Any = getattr(module, key, None)
        return value if isinstance(value, int) else None
    experts = count_experts(module)
    if experts is None:
        return None
    if key == "num_experts":
        return experts
    down = module._parameters.get("down_proj")
    if down is None or down.ndim != 3:
        return None
    hidden = getattr(module, "hidden_dim", None) or getattr(module, "hidden_size", None)
    sizes = list(down.shape[1:])
    if hidden in sizes:
        sizes.remove(hidden)
        return hidden if key == "hidden" else sizes[0]
    transposed = bool(getattr(module, "is_transposed", False))
    intermediate, hidden = (sizes[0], sizes[1]) if transposed else (sizes[1], sizes[0])
    return hidden if key == "hidden" else intermediate


__all__ = ["Decision", "Location", "Matches", "match", "satisfying", "survey"]
