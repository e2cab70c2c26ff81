"""How far a grafted SmolLM2 is from the same model in fp32: perplexity, divergence and agreement on English prose.

    python -m benchmarks.fidelity --format int8 --json
    python -m benchmarks.fidelity --format int4 --lm-head --json
    python -m benchmarks.fidelity --format int4 --moe --rotate --json

`mean_kl` is in nats, the reference's distribution first. `--activations` and `--placement` go to the operators as
kwargs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import smollm2
from benchmarks.report import emit
from benchmarks.transforms import rotate, upcycled

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fidelity:
    """Figures over `positions` predicted tokens."""

    positions: int
    perplexity_reference: float
    perplexity: float
    ratio: float
    mean_kl: float
    top1_agreement: float


def compare(reference: Logits, candidate: Logits, ids: torch.Tensor, *, context: int) -> Fidelity:
    """Runs both over consecutive windows of `context` tokens of `ids`; each maps int64 [1, t] to logits [1, t, vocab].

    Raises ValueError when `ids` do not fill one window, or logits are not finite.
    """
    if context < 2 or len(ids) < context:
        raise ValueError(f"{len(ids)} tokens do not fill one window of {context} (and a window takes at least 2)")
    positions = agreeing = 0
    sums = torch.zeros(3, dtype=torch.float64)  # reference's and candidate's negative log-likelihoods, divergence
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        expected, found = (run(window[None])[0, :-1] for run in (reference, candidate))
        # 128 rows at a time: a whole window's log-probabilities take 0.2 GB a copy
        for rows in range(0, context - 1, 128):
            targets = window[1:][rows : rows + 128, None]
            p = torch.log_softmax(expected[rows : rows + 128].float(), dim=-1)
            q = torch.log_softmax(found[rows : rows + 128].float(), dim=-1)
            if not torch.isfinite(q).all():
                raise ValueError(f"the candidate's logits are not finite near token {start + rows}")
            sums[0] -= p.gather(1, targets).double().sum()
            sums[1] -= q.gather(1, targets).double().sum()
            sums[2] += (p.exp() * (p - q)).double().sum()
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += context - 1
    before, after, kl = (sums / positions).tolist()
    return Fidelity(
        positions=positions,
        perplexity_reference=float(torch.tensor(before).exp()),
        perplexity=float(torch.tensor(after).exp()),
        ratio=float(torch.tensor(after - before).exp()),
        mean_kl=kl,
        top1_agreement=agreeing / positions,
    )


def rules(format: str, *, moe: bool, lm_head: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The rule file that grafts every decoder layer's weights, as a mapping."""
    replace = {"kwargs": {"format": format, **kwargs}, "device": "cpu"}
    listed = [
        {
            "id": "linear",
            "match": {"name": r"model\.layers\..*", "class": "torch.nn.Linear"},
            "replace": {"class": "linear", **replace},
        }
    ]
    if moe:
        listed.append(
            {"id": "experts", "match": {"class": "MixtralExperts"}, "replace": {"class": "experts", **replace}}
        )
    if lm_head:
        listed.append(
            {
                "id": "lm-head",
                "match": {"name": r"lm_head(\.inner)?", "class": "torch.nn.Linear"},
                "replace": {"class": "linear", **replace},
            }
        )
    return {"schema": 1, "rules": listed}


def source_model(options: argparse.Namespace) -> Any:
    """The model that is grafted: SmolLM2 itself, or one that computes the same with other weights."""
    model = smollm2.load_reference(dtype=getattr(torch, options.dtype))
    if options.moe:
        model = upcycled(model, experts=options.experts, topk=options.topk)
    if options.rotate:
        rotate(model, lm_head=options.lm_head, side=options.rotate)
    return model


def grafted(options: argparse.Namespace) -> Any:
    import numagraft

    kwargs = {name: getattr(options, name) for name in ("activations", "placement") if getattr(options, name)}
    mapping = rules(options.format, moe=options.moe, lm_head=options.lm_head, kwargs=kwargs)
    if options.moe or options.rotate or options.in_memory:
        return numagraft.optimize(source_model(options), rules=mapping)
    return numagraft.load_and_optimize(smollm2.gguf_path(), rules=mapping, dtype=getattr(torch, options.dtype))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__.split("\n")[0])
    made.add_argument("--format", required=True, help="bf16, int8, int4, ...: the operators' `format` kwarg")
    made.add_argument("--moe", action="store_true", help="upcycle each MLP into experts first")
    made.add_argument("--experts", type=int, default=4, help="experts per layer with --moe (default 4)")
    made.add_argument("--topk", type=int, default=2, help="experts per token with --moe (default 2)")
    made.add_argument("--lm-head", action="store_true", help="graft lm_head as well")
    made.add_argument(
        "--rotate",
        nargs="?",
        const="input",
        choices=("input", "output"),
        help="turn the weights off the file's own 4-bit grid first, on that side of each linear layer (default input)",
    )
    made.add_argument("--activations", help="the operators' `activations` kwarg")
    made.add_argument("--placement", help="the operators' `placement` kwarg")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the grafted model")
    made.add_argument("--in-memory", action="store_true", help="graft a model in memory, not the GGUF file")
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--context", type=int, default=1024, help="tokens per window")
    made.add_argument("--json", action="store_true", help="print only the JSON line")
    return made


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        ids = smollm2.text_tokens(options.tokens)
        reference = smollm2.load_reference()
        candidate = grafted(options)
        started = time.perf_counter()
        found = compare(
            lambda x: reference(x, use_cache=False).logits,
            lambda x: candidate(x, use_cache=False).logits,
            ids,
            context=options.context,
        )
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "format": options.format,
        "moe": options.moe,
        "lm_head": options.lm_head,
        "rotate": options.rotate,
        "dtype": options.dtype,
        "context": options.context,
        **vars(found),
        "seconds": time.perf_counter() - started,
    }
    emit(result, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
