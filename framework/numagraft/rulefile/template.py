"""Rule templates (`.yaml.j2`): rendered with the platform's facts, in a child process with little memory and time. No torch.

Jinja's sandbox keeps a template from reaching Python; it bounds neither memory nor time, so the process does.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numagraft.rulefile import template_sandbox
from numagraft.rulefile.nodes import MAX_BYTES
from numagraft.rulefile.problems import Problems
from numagraft.rulefile.rules import Location

if TYPE_CHECKING:
    from numagraft.platform import Platform

#: wall-clock seconds that the child may take, start included
TIMEOUT = 10.0


@dataclass(frozen=True)
class Rendered:
    """What a template rendered to; `lines[i]` is the template's line that line i + 1 came from."""

    text: str
    lines: tuple[int, ...]


def render(text: str, *, file: str, platform: Platform, config: Any = None) -> Rendered:
    """Raises RuleError with the template's line when it is wrong, reaches too far, or takes too much."""
    problems = Problems()
    marks = (template_sandbox.BEGIN, template_sandbox.END)
    if any(mark in text for mark in marks):
        problems.add(Location(file, 1, 1), "a control character in the template", "remove it")
        problems.raise_if_any(file)
    answer = _ask({"text": text, "context": facts(platform, config), "max_bytes": MAX_BYTES})
    if "error" in answer:
        line = int(answer.get("line") or 0)
        problems.add(Location(file, line, 1 if line else 0), answer["error"], answer.get("hint", ""))
        problems.raise_if_any(file)
    return Rendered(answer["text"], tuple(answer["lines"]))


def facts(platform: Platform, config: Any = None) -> dict[str, Any]:
    """What templates know, as plain data: `platform`, `gpus`, and `model` where a model's config is given."""
    nodes = [node for node in platform.nodes if node.id in platform.usable_nodes]
    known: dict[str, Any] = {
        "platform": {
            "nodes": [
                {
                    "id": node.id,
                    "socket": node.socket or 0,
                    "cores": len(platform.cores(node.id)),
                    "memory_gib": node.total_bytes >> 30,
                }
                for node in nodes
            ],
            "sockets": len(platform.sockets),
            "nodes_per_socket": platform.nodes_per_socket,
            "cores": len(platform.cores()),
            "isa": list(platform.isa),
            "vendor": platform.cpu.vendor,
            "machine": platform.cpu.arch,
        },
        "gpus": [
            {
                "index": index,
                "device": f"cuda:{index}",
                "name": gpu.name,
                "node": gpu.node,
                "memory_gib": (gpu.memory_bytes or 0) >> 30,
            }
            for index, gpu in enumerate(platform.gpus)
        ],
    }
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int):
        known["model"] = {"layers": layers, "type": str(getattr(config, "model_type", ""))}
    return known


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    script = Path(template_sandbox.__file__)
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the template takes more than {TIMEOUT:g} seconds", "hint": "render less"}
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        limit = template_sandbox.CPU_SECONDS
        return {"error": f"the template takes more than {limit} second of processor time", "hint": "render less"}
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": f"the template could not be rendered: {last[0][:200]}", "hint": "render less"}
    return answer
