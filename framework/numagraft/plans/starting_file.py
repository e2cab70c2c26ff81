"""A commented rule file to start from, for one model on one machine. Imports torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from numagraft import __version__, presets
from numagraft.roles import survey

if TYPE_CHECKING:
    from numagraft.platform import Platform

SCHEMA_HINT = "# Editors complete and check this file with: numagraft rules schema > schema.json\n"


def starting_file(model: nn.Module, platform: Platform, *, title: str) -> str:
    """The text of a rule file that plans as it is; what one may want to change stands in it as comments."""
    config = getattr(model, "config", None)
    family = presets.choose_part("family/auto", platform, config)
    machine = presets.choose_part("platform/auto", platform, config)
    roles = Counter(info.role for info in survey(model) if info.role and info.tower == "text")
    nodes = len(platform.usable_nodes)
    lines = [
        f"# Rules for {title}, written by numagraft {__version__} init",
        SCHEMA_HINT.rstrip(),
        "schema: 1",
        f"description: '{title.replace(chr(39), '')}'",
        "",
        "# What this file builds on; its own rules come before theirs, and its own vars win.",
        f"#   {family.name}: {family.why}",
        f"#   {machine.name}: {machine.why}",
        f"extends: [{family.name}, {machine.name}]",
        "",
        "vars:",
        "  format: int8              # bf16, int8 or int4",
        "  lm_head_format: int8",
        f"  placement: auto           # auto, shard, mirror, interleave or bind; usable nodes here: {nodes}",
        "",
        "# runtime:",
        f"#   nodes: [{', '.join(map(str, platform.usable_nodes))}]",
        f"#   threads_per_node: {max((len(platform.cores(node)) for node in platform.usable_nodes), default=1)}",
        "#   pages: auto             # auto, 4k, thp, 2m, 1g",
        "",
        "# What there is in this model, by role:",
        *(f"#   {role}: {count}" for role, count in sorted(roles.items(), key=lambda item: -item[1])),
        "#",
        "# Rules are tried in order, and the first that matches decides. For example:",
        "# rules:",
        "#   - id: first-layers-exact",
        "#     match: {role: linear, layers: \"0-1\"}",
        "#     replace: {class: linear, kwargs: {format: bf16}}",
    ]
    if roles["experts"]:
        lines += [
            "#   - id: experts          # in the place of the inherited rule",
            "#     override: true",
            "#     match: {role: experts}",
            "#     replace: {class: experts, kwargs: {format: int4, placement: shard}}",
        ]
    lines += [
        "#   - {id: lm_head, remove: true}   # keep the head as it is",
        "",
    ]
    return "\n".join(lines)
