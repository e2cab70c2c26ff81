"""Whether a rule file's `requires:` hold for a machine and a model. No torch."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Requirement, RuleSet

if TYPE_CHECKING:
    from numagraft.platform import Platform


def check_requires(rules: RuleSet, platform: Platform, model_type: str | None, problems: Problems) -> None:
    """Adds a problem for every requirement that does not hold; model_type None leaves the model's out."""
    for requirement in rules.requires:
        failed = why_not(requirement, platform, model_type)
        if failed:
            hint = "use a rule file for this machine (`numagraft rules match`), or change `requires`"
            if requirement.key == "model_type":
                hint = "use a rule file for this family (`numagraft rules match MODEL`), or change `requires`"
            problems.add(requirement.location, failed, hint)


def why_not(requirement: Requirement, platform: Platform, model_type: str | None) -> str:
    """Why the requirement does not hold, or ""."""
    key, value = requirement.key, requirement.value
    if key == "model_type":
        if model_type is None or model_type in value:
            return ""
        return f"requires model_type {' or '.join(value)}, found {model_type}"
    if key == "isa":
        missing = [name for name in value if not platform.supports(name)]
        runs = ", ".join(platform.isa)
        return f"requires the instruction set {', '.join(missing)}; this CPU runs {runs}" if missing else ""
    if key in ("vendor", "machine"):
        found = platform.cpu.vendor if key == "vendor" else platform.cpu.arch
        if found.lower() in [word.lower() for word in value]:
            return ""
        return f"requires {key} {' or '.join(value)}, found {found or 'unknown'}"
    if key in ("transformers", "numagraft"):
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            installed = version(key)
            if SpecifierSet(value).contains(installed, prereleases=True):
                return ""
            return f"requires {key} {value}, found {installed}"
        except InvalidSpecifier:
            return f"requires {key} {value!r}, which are no versions"
    number = count(platform, key)
    return "" if value.holds(number) else f"requires {key} {value}, found {number:,}"


def count(platform: Platform, key: str) -> int:
    """A platform's number for one of the compared requirements."""
    memory = [node.total_bytes for node in platform.nodes if node.id in platform.usable_nodes]
    counts: dict[str, Any] = {
        "numa_nodes": lambda: len(platform.usable_nodes),
        "sockets": lambda: len(platform.sockets),
        "nodes_per_socket": lambda: platform.nodes_per_socket,
        "cores": lambda: len(platform.cores()),
        "node_memory_gib": lambda: min(memory, default=0) >> 30,
        "memory_gib": lambda: sum(memory) >> 30,
        "gpus": lambda: len(platform.gpus),
    }
    return counts[key]()
