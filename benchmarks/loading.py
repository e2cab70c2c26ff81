"""Loading a large checkpoint: seconds, peak memory, and what is left in the page cache.

    python -m benchmarks.loading --json
    python -m benchmarks.loading --checkpoint DIR --format int4 --json

Without `--checkpoint` it writes one of random weights (Qwen3-30B-A3B's layers, at least `--gib`) and removes it again.
`peak_rss_anon_gib` is anonymous, shared and huge-page memory together; `peak_limit_gib` is what a streaming load may take:
the packed size, three times the largest fused parameter, and 1 GiB. `load_seconds` begins when Python has imported torch,
transformers and the model's code, which `import_seconds` tells. `page_faults` are the process's while it loads.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.memory import PeakMemory, cached_bytes, evict, own_bytes, warm
from benchmarks.report import emit

GIB = 2**30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.split("\n")[0])
    made.add_argument("--checkpoint", type=Path, help="a folder with safetensors (default: a made one)")
    made.add_argument("--gib", type=float, default=12.0, help="least size of the made checkpoint (default 12)")
    made.add_argument("--arch", default="qwen3_moe", help="of the made checkpoint")
    made.add_argument("--make", default="", help="more arguments for benchmarks.make_checkpoint, as one string")
    made.add_argument("--temporary", type=Path, help="where to make it (default: the system's temporary folder)")
    made.add_argument("--format", default="int8")
    made.add_argument("--placement", default="auto")
    made.add_argument("--cold", action="store_true", help="forget the files' pages first, instead of reading them in")
    made.add_argument("--json", action="store_true", help="print only the JSON line")
    return made


@contextmanager
def checkpoint(options: argparse.Namespace) -> Iterator[Path]:
    """The folder to load; a made one is written by another process, whose memory then counts for nothing here."""
    if options.checkpoint is not None:
        yield options.checkpoint
        return
    folder = Path(tempfile.mkdtemp(prefix="numagraft-", dir=options.temporary))
    try:
        out = folder / "checkpoint"
        size = [] if "--layers" in options.make else ["--at-least-gib", str(options.gib)]
        command = [sys.executable, "-m", "benchmarks.make_checkpoint", str(out), "--arch", options.arch, "--json"]
        subprocess.run([*command, *size, *options.make.split()], check=True, stdout=subprocess.DEVNULL)
        yield out
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rules(format: str, placement: str) -> dict[str, Any]:
    """Every weight that is multiplied: experts, linear layers and lm_head; the embedding and routers stay."""
    replace = {"device": "cpu", "kwargs": {"format": format, "placement": placement}}
    return {
        "schema": 1,
        "rules": [
            {
                "id": "experts",
                "match": {"role": "experts"},
                "replace": {"class": "experts", **replace},
                "optional": True,
            },
            {"id": "lm-head", "match": {"role": "lm_head"}, "replace": {"class": "linear", **replace}},
            {"id": "linear", "match": {"role": "linear"}, "replace": {"class": "linear", **replace}},
        ],
    }


def largest_fused_bytes(config: Any) -> int:
    """The largest parameter as the model holds it (experts fused), at the checkpoint's two bytes per weight."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return 2 * max(parameter.numel() for parameter in skeleton.parameters())


def grafted_bytes(model: Any) -> int:
    """Bytes that the operators hold in placed memory."""
    return sum(module.grafted_bytes() for module in model.modules() if hasattr(module, "grafted_bytes"))


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    import torch
    from transformers import AutoConfig

    import numagraft
    import numagraft.quantizer

    fused = largest_fused_bytes(AutoConfig.from_pretrained(path, local_files_only=True))  # imports the model's code
    importing = time.perf_counter() - begin
    files = sorted(path.glob("*.safetensors"))
    source = sum(file.stat().st_size for file in files)
    (evict if options.cold else warm)(files)
    cached_before = cached_bytes(files)
    baseline = own_bytes()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with PeakMemory() as peak:
        begin = time.perf_counter()
        model = numagraft.load_and_optimize(path, rules=rules(options.format, options.placement))
        seconds = time.perf_counter() - begin
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    residue = cached_bytes(files)
    packed = grafted_bytes(model)
    with torch.inference_mode():
        logits = model(torch.arange(8)[None]).logits
    return {
        "load_seconds": seconds,
        "import_seconds": importing,
        "page_faults": faults,
        "source_gib": source / GIB,
        "packed_gib": packed / GIB,
        "peak_rss_anon_gib": peak.bytes / GIB,
        "peak_limit_gib": (packed + 3 * fused) / GIB + 1,
        "baseline_rss_anon_gib": baseline / GIB,
        "resident_after_gib": own_bytes() / GIB,
        "largest_fused_gib": fused / GIB,
        "page_cache_before_gib": cached_before / GIB,
        "page_cache_residue_gib": residue / GIB,
        "source_gb_per_s": source / 1e9 / seconds,
        "format": options.format,
        "placement": options.placement,
        "logits_finite": bool(torch.isfinite(logits).all()),
    }


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch's threads when it loads
    options = parser().parse_args(arguments)
    from numagraft.errors import NumagraftError

    if options.checkpoint is not None and not any(options.checkpoint.glob("*.safetensors")):
        print(f"{options.checkpoint} holds no .safetensors files", file=sys.stderr)
        return 2
    try:
        with checkpoint(options) as path:
            result = measure(path, options)
    except (NumagraftError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    emit(result, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
