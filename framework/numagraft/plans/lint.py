"""What a rule file had better not say: alone, on models, and on machines. Imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from numagraft.errors import NumagraftError
from numagraft.matching import satisfying
from numagraft.placement import PlacementSpec, parse
from numagraft.planning import make_plan
from numagraft.platform.ids import format_list
from numagraft.roles import survey
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Location, RuleSet

if TYPE_CHECKING:
    from numagraft.platform import Platform

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to look at; `subject` is the model or machine on which it shows, "" for the file itself."""

    severity: Severity
    where: str
    message: str
    hint: str = ""
    subject: str = ""


def lint(rules: RuleSet, models: Mapping[str, nn.Module], platforms: Mapping[str, Platform]) -> list[Finding]:
    """Every finding: errors are what planning refuses, warnings what it accepts and should not be meant.

    Without platforms only the file and its matching are looked at, on a machine that is taken to have whatever it requires.
    """
    found = list(_patterns(rules))
    for title, model in models.items():
        found += _on_model(rules, model, title)
        for machine, platform in platforms.items():
            found += _planned(rules, model, platform, f"{title} on {machine}")
    for machine, platform in platforms.items():
        found += _on_platform(rules, platform, machine)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(dict.fromkeys(found), key=lambda finding: order[finding.severity])


# a dot outside of brackets, not escaped and not followed by a repeat, beside letters or digits
_BARE_DOT = re.compile(r"(?<!\\)(?<=[A-Za-z0-9_])\.(?=[A-Za-z_\\(0-9])")
# an index whose digits may go on: "layers\.1.*" also takes 10 to 19
_OPEN_INDEX = re.compile(r"(?:layers|blocks|h)(?:\\\.|\.)(\d+)(?=\.\*|\.\+|\[\^|\\d|\\w)")


def _patterns(rules: RuleSet) -> Iterator[Finding]:
    for rule in rules.rules:
        pattern = rule.match.name
        if pattern is None:
            continue
        where = str(rule.mark("match.name"))
        outside = re.sub(r"\[[^]]*\]", lambda found: "x" * len(found[0]), pattern)
        dot = _BARE_DOT.search(outside)
        if dot:
            text = f"rule {rule.id!r}: the dot at character {dot.start() + 1} of {pattern!r} matches any character"
            yield Finding("warning", where, text, r"write \.")
        index = _OPEN_INDEX.search(outside)
        if index:
            number = index[1]
            yield Finding(
                "warning",
                where,
                f"rule {rule.id!r}: {index[0]!r} also takes {number}0 to {number}9",
                rf"end the index: {number}\..*, or use layers: {number}",
            )
        if pattern.startswith("^") or pattern.endswith("$"):
            yield Finding("note", where, f"rule {rule.id!r}: ^ and $ are not needed: names are matched whole")


def _on_model(rules: RuleSet, model: nn.Module, title: str) -> Iterator[Finding]:
    infos = survey(model)
    problems = Problems()
    hits = satisfying(infos, rules.rules, problems)
    for problem in problems.sorted():
        yield Finding("error", problem.where, problem.message, problem.hint, title)
    experts = {index for index, info in enumerate(infos) if info.role == "experts"}
    covered = set().union(*hits.values()) if hits else set()
    if experts and not experts & covered:
        for rule in rules.rules:
            linear = rule.match.class_name is not None and rule.match.class_name.rpartition(".")[2] == "Linear"
            if (linear or rule.match.role == "linear") and rule.replace.operator != "default":
                yield Finding(
                    "warning",
                    str(rule.mark("match.class" if linear else "match.role")),
                    f"rule {rule.id!r} takes linear layers, but the experts of this model are fused parameters of "
                    f"{len(experts)} modules that no rule takes",
                    "add a rule with role: experts",
                    title,
                )
                break
    for rule in rules.rules:
        layers = {infos[index].layer for index in hits[rule.id]}
        known = [info.layer for info in infos if info.role == "decoder_layer" and info.tower == "text"]
        wanted = rule.match.layers
        if wanted is not None and known and hits[rule.id]:
            beyond = sorted(layer for layer in wanted if layer not in known)
            if beyond:
                yield Finding(
                    "warning",
                    str(rule.mark("match.layers")),
                    f"rule {rule.id!r} names layer {beyond[0]}, the model has {min(known)}-{max(known)}",
                    "",
                    title,
                )
        if rule.match.name is not None and len(layers) > 2 and None not in layers:
            role = {infos[index].role for index in hits[rule.id]}
            if len(role) == 1:
                same = {info.layer for info in infos if info.role in role and info.layer is not None}
                missing = sorted(layer for layer in same - layers if min(layers) < layer < max(layers))
                if missing and rule.match.layers is None:
                    yield Finding(
                        "warning",
                        str(rule.mark("match.name")),
                        f"rule {rule.id!r} takes layers {format_list(layers)}, but not {format_list(missing)} between them",
                        "a pattern over digits that leaves some out; use layers: instead",
                        title,
                    )


def _planned(rules: RuleSet, model: nn.Module, platform: Platform, subject: str) -> Iterator[Finding]:
    try:
        plan = make_plan(model, rules, platform)
    except NumagraftError as error:
        for problem in error.problems:
            yield Finding("error", problem.where, problem.message, problem.hint, subject)
        if not error.problems:
            yield Finding("error", rules.source, str(error), "", subject)
        return
    for text in plan.fallbacks:
        yield Finding("warning", rules.source, text, "", subject)
    for text in plan.notes:
        if "shadowed" in text:
            where, _, message = text.partition(": ")
            yield Finding("note", where, message, "", subject)


def _on_platform(rules: RuleSet, platform: Platform, subject: str) -> Iterator[Finding]:
    """Settings that hurt there."""

    def place(key: str) -> str:
        return str(rules.marks.get(f"runtime.{key}", Location(rules.source, 0, 0)))

    usable = platform.usable_nodes
    runtime = rules.runtime
    if isinstance(runtime.threads_per_node, int):
        cores = min((len(platform.cores(node)) for node in usable), default=1)
        if runtime.threads_per_node > cores:
            text = f"{runtime.threads_per_node} threads per node, {cores} cores: two threads would share a core"
            yield Finding("warning", place("threads_per_node"), text, "write auto", subject)
    if runtime.nodes != "all":
        left = sorted(set(usable) - set(runtime.nodes))
        if left:
            yield Finding("note", place("nodes"), f"nodes {', '.join(map(str, left))} stay idle", "", subject)
    if runtime.pages in ("2m", "1g"):
        size = (2 << 20) if runtime.pages == "2m" else (1 << 30)
        free = sum(pages.free for node in platform.nodes for pages in node.huge_pages if pages.page_bytes == size)
        if not free:
            text = f"pages: {runtime.pages}, but none are reserved there"
            yield Finding("warning", place("pages"), text, "reserve them, or write auto", subject)
    if not runtime.strict:
        text = "strict: false: wrong placement is reported, not refused"
        yield Finding("note", place("strict"), text, "", subject)
    for rule in rules.rules:
        spec = _spec(rule.replace.kwargs.get("placement"))
        if spec is None or spec.policy != "mirror":
            continue
        where = str(rule.mark("replace.kwargs.placement"))
        if len(usable) == 1:
            yield Finding("note", where, f"rule {rule.id!r}: a mirror on one node is one copy", "", subject)
        elif platform.nodes_per_socket > 1 and spec.per == "node" and spec.nodes is None:
            text = f"rule {rule.id!r}: a mirror makes {len(usable)} copies here, one per node and not per socket"
            yield Finding("warning", where, text, "placement: {policy: mirror, per: socket}, or shard", subject)


def _spec(value: Any) -> PlacementSpec | None:
    try:
        return parse(value) if value is not None else None
    except NumagraftError:
        return None


def worst(findings: Sequence[Finding]) -> Severity | None:
    """The gravest severity there is."""
    for severity in ("error", "warning", "note"):
        if any(finding.severity == severity for finding in findings):
            return severity  # type: ignore[return-value]
    return None
