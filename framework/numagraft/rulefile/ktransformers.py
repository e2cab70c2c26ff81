"""Converts KTransformers' archived injection rules into ours, and lists what has no counterpart. No torch.

Their files are a bare list of `{match: {name, class}, replace: {class, kwargs}, recursive}`. Names are searched there and
matched whole here; devices are per phase there (`generate_device`, `prefill_device`) and one here; a model-wide
`transfer_map` moves hidden states there, and follows from the devices here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numagraft.rulefile.nodes import Items, Leaf, Node, Table, parse, plain
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Location

DEVICE_KEYS = ("generate_device", "prefill_device", "out_device", "device")
#: formats by the backends and operators of theirs that say how weights are stored
FORMATS = {
    "AMXInt8": "int8",
    "AMXInt4": "int4",
    "AMXBF16": "bf16",
    "KLinearMarlin": "int4",
    "KLinearQ8": "int8",
    "KLinearFP8": "int8",
    "KExpertsMarlin": "int4",
}
#: what a part of a GGUF tensor's name stands for: our role, and our operator for it
_TENSORS = {
    "exps": ("experts", "experts"),
    "shexp": ("shared_experts", "torch"),
    "attn": ("attention", "default"),
    "ffn": ("linear", "linear"),
}
KNOWN_KWARGS = {
    *DEVICE_KEYS,
    "generate_op",
    "prefill_op",
    "transfer_map",
    "backend",
    "absorb_for_prefill",
    "chunk_prefill_size",
    "chunck_size",
    "per_layer_prefill_intput_threshold",
}


@dataclass
class Conversion:
    """Our rule file's text, and everything of theirs that it could not take along."""

    text: str = ""
    rules: int = 0
    notes: list[str] = field(default_factory=list)


def convert(text: str, *, file: str) -> Conversion:
    """Raises RuleError when `text` is no YAML list of their rules."""
    node = parse(text, file=file)
    problems = Problems()
    if not isinstance(node, Items):
        problems.add(node.location, "no list of rules", "KTransformers' files are a bare list of match/replace")
        problems.raise_if_any(file)
    assert isinstance(node, Items)
    comments = _comments(text)
    result = Conversion()
    blocks: list[str] = []
    previous = 0
    for index, item in enumerate(node.items):
        if not isinstance(item, Table) or "match" not in item.entries or "replace" not in item.entries:
            problems.add(item.location, "found no match/replace", "expected a rule")
            continue
        above = [comments[line] for line in range(previous + 1, item.location.line) if line in comments]
        previous = item.location.line
        blocks.append(_rule(item, index, above, result))
        result.rules += 1
    problems.raise_if_any(file)
    head = ["schema: 1", f"description: {_quoted(f'converted from {file}')}", "rules:"]
    trailer = ["  # theirs left everything else alone, and so does this file"]
    result.text = "\n".join([*head, *blocks, *trailer]) + "\n"
    return result


def _comments(text: str) -> dict[int, str]:
    """Whole-line comments by line number."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip().startswith("#"):
            found[number] = line.strip()
    return found


def _rule(item: Table, index: int, above: Sequence[str], result: Conversion) -> str:
    match, replace = item.get("match"), item.get("replace")
    where = str(item.location)
    lines = [f"  {comment}" for comment in above]
    lines.append(f"  - id: kt-{index + 1}")
    conditions = _match(match, where, result)
    lines.append(f"    match: {{{', '.join(conditions)}}}")
    old = replace.get("class") if isinstance(replace, Table) else None
    old_class = str(old.value) if isinstance(old, Leaf) else "default"
    kwargs = plain(replace.get("kwargs")) if isinstance(replace, Table) and replace.get("kwargs") else {}
    if not isinstance(kwargs, Mapping):
        result.notes.append(f"{where}: kwargs that are no mapping were left out")
        kwargs = {}
    operator, device, ours = _replace(old_class, kwargs, where, result)
    inside = [f"class: {operator}"]
    if device is not None:
        inside.append(f'device: "{device}"')
    if ours:
        inside.append("kwargs: {" + ", ".join(f"{key}: {value}" for key, value in ours.items()) + "}")
    lines.append(f"    replace: {{{', '.join(inside)}}}  # {old_class if old_class.isprintable() else ascii(old_class)}")
    recursive = item.get("recursive")
    if isinstance(recursive, Leaf) and recursive.value is False:
        lines.append("    recursive: false")
    lines.append("    optional: true")
    for key in item.entries:
        if key not in ("match", "replace", "recursive"):
            result.notes.append(f"{where}: the key {key!r} is unknown (theirs ignored it) and was left out")
    return "\n".join(lines)


def _match(match: Node | None, where: str, result: Conversion) -> list[str]:
    conditions = []
    name = match.get("name") if isinstance(match, Table) else None
    if isinstance(name, Leaf) and isinstance(name.value, str):
        conditions.append(f"name: {_quoted(whole(name.value))}")
    cls = match.get("class") if isinstance(match, Table) else None
    if isinstance(cls, Leaf) and isinstance(cls.value, str):
        # their models were copies inside ktransformers; the class itself has transformers' name
        dotted = cls.value
        if dotted.startswith("ktransformers."):
            dotted = dotted.rpartition(".")[2]
        if (
            dotted.endswith(("MoE", "SparseMoeBlock", "MoEBlock", "Moe", "MoeBlock"))
            or "MoE" in dotted.rpartition(".")[2]
        ):
            result.notes.append(
                f"{where}: {dotted} is a whole mixture block; ours grafts its experts and linears instead"
            )
        conditions.append(f"class: {dotted if re.fullmatch(r'[A-Za-z_][A-Za-z0-9_.]*', dotted) else _quoted(dotted)}")
    if not conditions:
        conditions.append("name: '.*'")
        result.notes.append(f"{where}: the match has neither name nor class; every module matches, as in theirs")
    return conditions


def _quoted(text: str) -> str:
    """A YAML scalar on one line: in single quotes, where patterns stay readable, unless a character must be escaped."""
    if text.isprintable():
        return f"'{text.replace(chr(39), chr(39) * 2)}'"
    escaped = (
        character if character.isprintable() and character not in '\\"' else f"\\U{ord(character):08X}"
        for character in text
    )
    return f'"{"".join(escaped)}"'


def whole(pattern: str) -> str:
    """A pattern that matches whole what `pattern` is found in: theirs are searched, ours match the whole name."""
    if _alternatives(pattern):
        return f".*(?:{pattern}).*"  # anchors still hold inside
    begin = "" if pattern.startswith("^") else ".*"
    anchored = pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern.removeprefix("^")
    return f"{begin}{inner[:-1] if anchored else inner + '.*'}".replace(".*.*", ".*")


def _alternatives(pattern: str) -> bool:
    """Whether a | stands outside of every group."""
    depth, index = 0, 0
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            index += 1
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == "|" and not depth:
            return True
        index += 1
    return False


def _replace(
    old_class: str, kwargs: Mapping[str, Any], where: str, result: Conversion
) -> tuple[str, str | None, dict[str, str]]:
    """Our operator, device and kwargs for one of their classes."""
    short = old_class.rpartition(".")[2]
    generate, prefill = kwargs.get("generate_device"), kwargs.get("prefill_device")
    device = next((str(kwargs[key]) for key in DEVICE_KEYS if kwargs.get(key)), None)
    if generate and prefill and generate != prefill:
        result.notes.append(
            f"{where}: decodes on {generate} and prefills on {prefill}; ours has one device per module: {generate} is kept"
        )
        device = str(generate)
    for key in kwargs:
        if key not in KNOWN_KWARGS:
            result.notes.append(f"{where}: the kwarg {key!r} is unknown and was left out")
    ours: dict[str, str] = {}
    for key in ("backend", "generate_op", "prefill_op"):
        value = kwargs.get(key)
        if isinstance(value, str) and value in FORMATS:
            ours["format"] = FORMATS[value]
            break
    if short == "default":
        return "default", _own(device), {}
    if "Expert" in short:
        out = kwargs.get("out_device")
        if out and out != generate:
            result.notes.append(f"{where}: out_device {out} is not needed: results return to where the layer is")
        if device is not None and device != "cpu":
            result.notes.append(f"{where}: experts on {device} stay torch's own computation")
            return "torch", _own(device), {}
        return "experts", "cpu", ours
    if "Linear" in short:
        if device is not None and device != "cpu":
            operator = kwargs.get("generate_op")
            result.notes.append(
                f"{where}: {operator or short} on {device} becomes torch's own linear there, unquantised"
            )
            return "torch", _own(device), {}
        return "linear", "cpu", ours
    if short.endswith("Model") or "transfer_map" in kwargs:
        layers = kwargs.get("transfer_map")
        if isinstance(layers, Mapping):
            result.notes.append(
                f"{where}: transfer_map {dict(layers)} follows from the devices of the layers; left out"
            )
        if kwargs.get("per_layer_prefill_intput_threshold"):
            result.notes.append(f"{where}: per_layer_prefill_intput_threshold has no counterpart")
        return "default", None, {}
    if short.startswith(("RotaryEmbedding", "YarnRotary", "DynamicNTK")) or "Rotary" in short:
        return "default", _own(device), {}
    if "Attention" in short:
        for key in ("absorb_for_prefill", "chunk_prefill_size", "chunck_size"):
            if key in kwargs:
                result.notes.append(f"{where}: {key} has no counterpart")
        result.notes.append(f"{where}: {short} becomes torch's own attention on its device")
        return "default", _own(device), {}
    result.notes.append(
        f"{where}: {short} has no counterpart; the module is kept" + (f" on {device}" if device else "")
    )
    return "default", _own(device), {}


def _own(device: str | None) -> str | None:
    if device is None:
        return None
    return device.lower() if re.fullmatch(r"cpu|cuda(:\d+)?", device.lower()) else None


def convert_tensor_overrides(texts: Sequence[str]) -> Conversion:
    """llama.cpp's `--override-tensor REGEX=BUFFER` strings (comma-separated too), in their order, as rules.

    Their patterns are over GGUF tensor names; known parts are translated, anything else is listed.
    """
    result = Conversion()
    blocks = []
    parts = [part for text in texts for part in text.split(",")]
    for number, text in enumerate(parts, start=1):
        if not text.isprintable():  # it becomes a comment: a line break in it would become rules
            result.notes.append(f"{text!r}: holds a control character; left out")
            continue
        pattern, equals, buffer = text.rpartition("=")
        device = {"CPU": "cpu"}.get(buffer, f"cuda:{buffer[4:]}" if re.fullmatch(r"CUDA\d+", buffer) else None)
        if not equals or device is None:
            result.notes.append(f"{text!r}: the buffer is neither CPU nor CUDAn; left out")
            continue
        location = Location("--override-tensor", number, 1)
        role, operator = next((pair for part, pair in _TENSORS.items() if part in pattern), (None, "default"))
        if role is None:
            result.notes.append(f"{text!r}: no role corresponds to these tensors; left out")
            continue
        if operator in ("experts", "linear") and device != "cpu":
            operator = "torch"
        conditions = [f"role: {role}"]
        layers = _layers(pattern)
        if layers:
            conditions.append(f'layers: "{layers}"')
        elif re.search(r"blk", pattern) and not re.search(r"blk\\?\.(\.\*|\\d\+|\[0-9\][+*]|\*)", pattern):
            result.notes.append(f"{text!r}: which layers it means could not be read; every layer is taken ({location})")
        blocks.append(
            f"  - id: ot-{number}\n    match: {{{', '.join(conditions)}}}\n"
            f'    replace: {{class: {operator}, device: "{device}"}}  # {text}\n    optional: true'
        )
        result.rules += 1
    result.text = "\n".join(["schema: 1", "description: 'converted from --override-tensor'", "rules:", *blocks]) + "\n"
    return result


def _layers(pattern: str) -> str:
    """`blk\\.(3|4|[5-7])\\.` as "3,4,5-7"; "" when it says no layers that can be read."""
    found = re.search(r"blk\\?\.(\d+|\([0-9|\[\]-]+\)|\[\d-\d\])\\?\.", pattern)
    if found is None:
        return ""
    parts = []
    for part in found[1].strip("()").split("|"):
        single = re.fullmatch(r"(\d*)(?:\[(\d)-(\d)\])?", part)
        if single is None or not part:
            return ""
        head, first, last = single.groups()
        parts.append(f"{head}{first}-{head}{last}" if first is not None else head)
    return ",".join(parts)


def convert_flags(arguments: Sequence[str]) -> Conversion:
    """`--kt-*` flags of SGLang's integration as a rule file: what they say of experts, threads and nodes."""
    result = Conversion()
    values: dict[str, str] = {}
    index = 0
    while index < len(arguments):
        key, equals, value = arguments[index].partition("=")
        if not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            index += 1
            value = arguments[index]
        values[key] = value
        index += 1
    methods = {
        "AMXINT4": "int4",
        "RAWINT4": "int4",
        "AMXINT8": "int8",
        "MOE_INT8": "int8",
        "AMXBF16": "bf16",
        "BF16": "bf16",
    }
    lines = ["schema: 1", "description: 'converted from --kt flags'", "extends: [family/generic]"]
    runtime = []
    for key, value in values.items():
        if key == "--kt-method" and value in methods:
            lines.append(f"vars: {{format: {methods[value]}}}")
        elif key == "--kt-numa-nodes":
            runtime.append(f"nodes: [{', '.join(re.findall(r'[0-9]+', value))}]")
        elif key == "--kt-cpuinfer":
            result.notes.append(f"{key} {value}: threads over all nodes; ours are per node: threads_per_node")
        elif key == "--kt-threadpool-count":
            result.notes.append(f"{key} {value}: one pool per node is made by itself")
        elif key == "--kt-weight-path":
            result.notes.append(f"{key}: the model's own checkpoint is read; pass it as MODEL")
        else:
            result.notes.append(f"{' '.join((key, value)).strip()}: has no counterpart")
    if runtime:
        lines.append(f"runtime: {{{', '.join(runtime)}}}")
    result.text = "\n".join(lines) + "\n"
    result.rules = 0
    return result
