"""`numagraft bench`: prefill and decode of a grafted model, warm and repeated, and what may have distorted it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numagraft.cli.sources import Json, Model, Rules, Settings
from numagraft.errors import ConfigurationError

if TYPE_CHECKING:
    from numagraft.platform import Platform

MANIFEST = ".manifest.yaml"


def bench(
    model: Model,
    rules: Rules = "auto",
    settings: Settings = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Measurements after one that does not count; the median is taken.")] = 3,
    share: Annotated[bool, typer.Option("--share", help="Write the figures into the rule file's manifest.")] = False,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode tokens per second of MODEL grafted by RULES."""
    target = manifest_path(rules) if share else None
    if target is not None and settings:
        raise ConfigurationError("--share with --set would claim for the file what it does not say: put the settings into it")
    if target is not None and target.exists():
        from numagraft.rulefile.manifest import read_manifest

        read_manifest(target.read_text(encoding="utf-8"), file=str(target))  # wrong ones are refused before minutes of work
    from numagraft.api import load_and_optimize
    from numagraft.cli.sources import quiet_transformers
    from numagraft.platform import Platform

    quiet_transformers()
    grafted = load_and_optimize(model, rules=rules, overrides=tuple(settings or ()))
    platform = Platform.detect()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_facts(platform),
        "model": Path(model).name,
        "rules": Path(rules).name if Path(rules).is_file() else rules,
        "versions": {name: version(name) for name in ("numagraft", "torch", "transformers")},
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        **measure(grafted, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeat=repeat),
        "distortions": distortions(platform),
        "strict": bool(grafted.numagraft_plan.layout.strict),
    }
    if target is not None:
        write_validation(target, result)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"prefill {result['prefill_tokens_per_s']:,.1f} tokens/s ({prompt_tokens} tokens, median of {repeat})")
    typer.echo(f"decode  {result['decode_tokens_per_s']:,.1f} tokens/s ({new_tokens} tokens, one request)")
    for text in result["distortions"]:
        typer.echo(f"distorted: {text}")
    if target is not None:
        typer.echo(f"written into {target}")


def measure(model: Any, *, prompt_tokens: int, new_tokens: int, repeat: int) -> dict[str, float]:
    """Tokens per second: a forward pass over the prompt, and generation less its first token. Prompts are random tokens."""
    import torch

    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, prompt_tokens), generator=generator)

    def generate(count: int) -> Any:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    with torch.inference_mode():
        prefill = median_seconds(lambda: model(ids, use_cache=False, logits_to_keep=1), repeat)
        first = median_seconds(lambda: generate(1), repeat)
        whole = median_seconds(lambda: generate(new_tokens), repeat)
    decode = max(whole - first, 1e-9)
    return {
        "prefill_tokens_per_s": round(prompt_tokens / prefill, 2),
        "decode_tokens_per_s": round((new_tokens - 1) / decode, 2),
    }


def median_seconds(call: Callable[[], Any], repeat: int) -> float:
    """The median of `repeat` calls after one that does not count."""
    call()
    found = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def machine_facts(platform: Platform) -> dict[str, Any]:
    """A fingerprint and what a reader wants to know; nothing that names the machine or its owner."""
    from numagraft.doctor.measurement import fingerprint

    memory = sum(node.total_bytes for node in platform.nodes if node.id in platform.usable_nodes)
    return {
        "fingerprint": fingerprint(platform),
        "cpu": platform.cpu.model,
        "isa": platform.isa[0],
        "sockets": len(platform.sockets),
        "numa_nodes": len(platform.usable_nodes),
        "cores": len(platform.cores()),
        "memory_gib": memory >> 30,
        "kernel": platform.kernel.release.partition("-")[0],  # what follows may name who built it
    }


def distortions(platform: Platform) -> list[str]:
    """What the doctor says hurts here, and other load on the machine."""
    from numagraft.doctor.circumstances import Circumstances
    from numagraft.doctor.diagnosis import diagnose

    found = [each.found for each in diagnose(Circumstances.of(platform)).findings if each.severity == "hurts"]
    load = os.getloadavg()[0]
    cores = len(platform.cores())
    if load > 1.5 * cores:
        found.append(f"load average {load:.1f} on {cores} cores")
    return found


def manifest_path(rules: str) -> Path:
    """Where `--share` writes: the manifest beside a rule file of one's own.

    Raises ConfigurationError for a preset, which is somebody else's.
    """
    path = Path(rules)
    if not path.is_file():
        raise ConfigurationError(f"--share writes beside a rule file of your own; {rules!r} is a preset or does not exist")
    return path.with_name(path.name.removesuffix(".j2").removesuffix(".yaml").removesuffix(".yml") + MANIFEST)


def write_validation(path: Path, result: dict[str, Any]) -> None:
    """Adds a measurement to the manifest at `path`, made where there is none; the file is replaced as a whole.

    Raises RuleError when the manifest there is wrong; nothing is written then.
    """
    import yaml

    from numagraft.rulefile.manifest import read_manifest

    known: dict[str, Any] = {"schema": 1, "memory": "not said", "firmware": "not said", "validated_on": []}
    if path.exists():
        known = read_manifest(path.read_text(encoding="utf-8"), file=str(path))
    entries = [*known.get("validated_on", []), result]
    made = {**known, "status": "measured", "validated_on": entries}
    text = yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=120).replace(
        f"date: '{result['date']}'", f"date: {result['date']}"
    )
    read_manifest(text, file=str(path))
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)
