"""A preset's manifest (`NAME.manifest.yaml` beside `NAME.yaml`): what people should know before they use it. No torch."""

from __future__ import annotations

from typing import Any

from numagraft.rulefile import schema
from numagraft.rulefile.nodes import Items, Leaf, Node, Table, parse, plain
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.schema import Boolean, Choice, Exactly, Field, ListOf, Record, Text


class Number(schema.Type):
    expected = "a number"

    def read(self, node: Node, problems: Problems) -> Any:
        if isinstance(node, Leaf) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return node.value
        return self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        return {"type": "number"}


class Facts(schema.Type):
    """A flat mapping of names to text and numbers."""

    expected = "a mapping of names to text and numbers"

    def read(self, node: Node, problems: Problems) -> Any:
        flat = isinstance(node, Table) and not any(isinstance(child, Table | Items) for child in node.entries.values())
        return plain(node) if flat else self.wrong(node, problems)

    def json(self) -> dict[str, Any]:
        return {"type": "object"}


VALIDATED = Record(
    "a validation",
    {
        "date": Field(Text("a date"), "day of the measurement", required=True),
        "machine": Field(Facts(), "fingerprint of the machine", required=True),
        "model": Field(Text(), "what was run", required=True),
        "rules": Field(Text(), "rule file or presets that were measured together"),
        "versions": Field(Facts(), "numagraft, torch, transformers, kernel"),
        "prompt_tokens": Field(Number(), "tokens of the prompt"),
        "new_tokens": Field(Number(), "tokens generated"),
        "prefill_tokens_per_s": Field(Number(), "measured, warm"),
        "decode_tokens_per_s": Field(Number(), "measured, warm"),
        "distortions": Field(ListOf(Text()), "what may have distorted it"),
        "strict": Field(Boolean(), "whether placement was verified"),
    },
)
MANIFEST = Record(
    "manifest",
    {
        "schema": Field(Exactly(1), "version of this format", required=True),
        "status": Field(Choice(("measured", "planned, not measured")), "whether anybody measured it", required=True),
        "memory": Field(Text(), "how much memory it takes", required=True),
        "firmware": Field(Text(), "what to set in the firmware (NPS, SNC, interleaving)", required=True),
        "validated_on": Field(ListOf(VALIDATED), "measurements", required=True),
        "author": Field(Text(), "who wrote it"),
        "licence": Field(Text(), "licence of the preset"),
    },
)


def read_manifest(text: str, *, file: str) -> dict[str, Any]:
    """The manifest as plain data. Raises RuleError with every problem; measured without a measurement is one."""
    problems = Problems()
    node = parse(text, file=file)
    values = MANIFEST.read(node, problems)
    if isinstance(values, dict) and values.get("status") == "measured" and not values.get("validated_on"):
        problems.add(node.location, "status is measured, but validated_on is empty", "write: planned, not measured")
    problems.raise_if_any(file)
    return values
