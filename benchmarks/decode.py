"""Tokens per second of a whole model: SmolLM2 grafted, and the same model as transformers runs it in bf16.

    python -m benchmarks.decode --format int8 --json

Prefill is one forward pass over the prompt; decode is `generate`, less the time of its first token.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from benchmarks.report import Table, emit
from numagraft.cli.bench_command import median_seconds


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split("\n")[0])
    made.add_argument("--format", default="int8")
    made.add_argument("--no-lm-head", action="store_true", help="leave lm_head as it is")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of both models")
    made.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 128, 512])
    made.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--repeat", type=int, default=3)
    made.add_argument("--no-peer", action="store_true", help="do not run the ungrafted model")
    made.add_argument("--json", action="store_true", help="print only the JSON line")
    return made


def tokens_per_second(model: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{"prefill": {"512": ...}, "decode": {"1": ...}}: by prompt length, and by batch size."""
    import torch

    from benchmarks import smollm2

    ids = smollm2.text_tokens(max(*options.prompt_tokens, 16))

    def generate(batch: int, count: int) -> Any:
        prompt = ids[None, :16].expand(batch, -1)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=2,
        )

    prefill, decode = {}, {}
    for length in options.prompt_tokens:
        prompt = ids[None, :length]
        prefill[str(length)] = length / median_seconds(lambda p=prompt: model(p, use_cache=False), options.repeat)
    for batch in options.batch:
        first = median_seconds(lambda b=batch: generate(b, 1), options.repeat)
        all_of_them = median_seconds(lambda b=batch: generate(b, options.new_tokens), options.repeat)
        decode[str(batch)] = batch * (options.new_tokens - 1) / (all_of_them - first)
    return {"prefill": prefill, "decode": decode}


def grafted(options: argparse.Namespace) -> Any:
    import torch

    import numagraft
    from benchmarks import smollm2
    from benchmarks.fidelity import rules

    mapping = rules(options.format, moe=False, lm_head=not options.no_lm_head, kwargs={})
    return numagraft.load_and_optimize(smollm2.gguf_path(), rules=mapping, dtype=getattr(torch, options.dtype))


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks import smollm2

    with torch.inference_mode():
        result: dict[str, Any] = {"format": options.format, "dtype": options.dtype, "new_tokens": options.new_tokens}
        result["grafted"] = tokens_per_second(grafted(options), options)
        if not options.no_peer:
            peer = smollm2.load_reference(dtype=getattr(torch, options.dtype))
            result["transformers"] = tokens_per_second(peer, options)
            result["speedup"] = {
                phase: {key: rate / result["transformers"][phase][key] for key, rate in of_phase.items()}
                for phase, of_phase in result["grafted"].items()
            }
            result["decode_speedup"] = next(iter(result["speedup"]["decode"].values()))
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        (
            phase,
            key,
            rate,
            result.get("transformers", {}).get(phase, {}).get(key),
            result.get("speedup", {}).get(phase, {}).get(key),
        )
        for phase, of_phase in result["grafted"].items()
        for key, rate in of_phase.items()
    ]
    columns = ("phase", "prompt or batch", f"numagraft {result['format']}", f"transformers {result['dtype']}", "ratio")
    return [Table("tokens per second", columns, rows)]


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch's threads when it loads
    options = parser().parse_args(arguments)
    from numagraft.errors import NumagraftError

    try:
        result = run(options)
    except (NumagraftError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    emit(result, tables(result), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
