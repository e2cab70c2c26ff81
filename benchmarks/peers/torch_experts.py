"""Experts as transformers runs them in bf16: its grouped matmul, or its loop over the experts.

python -m benchmarks.peers.torch_experts --tokens 16 --format grouped_mm
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.bf16 import normal
from benchmarks.operands import relative_error
from benchmarks.peers.common import expected, gaussian, layers_and_experts, parser, print_result, routed, timed


def layer(options: Any, experts: int, seed: int) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=experts,
        num_experts_per_tok=options.topk,
    )
    config._experts_implementation = options.format
    with torch.device("meta"):
        made = Qwen3MoeExperts(config)
    gate_up = gaussian((experts, 2 * options.intermediate, options.hidden), seed=seed)
    down = gaussian((experts, options.hidden, options.intermediate), seed=seed + 1)
    for name, bits in (("gate_up_proj", gate_up), ("down_proj", down)):
        weight = torch.from_numpy(bits.view("int16")).view(torch.bfloat16)
        setattr(made, name, torch.nn.Parameter(weight, requires_grad=False))
    return made.eval()


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parser("torch_experts", ["grouped_mm", "eager"]).parse_args(arguments)
    torch.set_num_threads(options.threads)
    layers, experts = layers_and_experts(options, bytes_per_weight=2)
    modules = [layer(options, experts, seed=10 * i) for i in range(layers)]
    calls = routed(options, layers=layers, experts=experts)
    bits = normal(options.tokens * options.hidden, std=1.0, seed=7).reshape(options.tokens, options.hidden)
    x = torch.from_numpy(bits.view("int16")).view(torch.bfloat16)

    def call() -> int:
        made = next(calls)
        ids, weights = torch.from_numpy(made.ids), torch.from_numpy(made.weights).bfloat16()
        begin = time.perf_counter_ns()
        modules[made.layer](x, ids, weights)
        return time.perf_counter_ns() - begin

    result = {
        "peer": f"torch {options.format} bf16",
        **timed(call, seconds=options.seconds, warm_up=max(2, layers)),
        "layers": layers,
        "experts_resident": experts,
    }
    if options.error:
        made = next(routed(options, layers=1, experts=experts))
        rows = min(options.tokens, 16)
        first = type(made)(0, made.ids[:rows].copy(), made.weights[:rows].copy(), made.distinct)
        out = modules[0](x[:rows], torch.from_numpy(first.ids), torch.from_numpy(first.weights).bfloat16())
        gate_up = modules[0].gate_up_proj.view(torch.int16).numpy().view("uint16")
        down = modules[0].down_proj.view(torch.int16).numpy().view("uint16")
        half = options.intermediate
        result["error_unquantised"] = relative_error(
            out.float().numpy(), expected(bits[:rows], first, gate_up[:, :half], gate_up[:, half:], down)
        )
    print_result(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
