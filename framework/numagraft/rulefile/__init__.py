"""Rule files: text in, RuleSet out."""

from __future__ import annotations

from numagraft.rulefile.load import load_rules
from numagraft.rulefile.rules import Location, Match, Replace, Requirement, Rule, RuleSet

__all__ = ["Location", "Match", "Replace", "Requirement", "Rule", "RuleSet", "load_rules"]
