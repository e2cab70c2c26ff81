"""Experts as kt-kernel runs them, with an interpreter that has kt-kernel, torch and numpy.

    PYTHONPATH=. KT_PYTHON -m benchmarks.peers.kt_experts --tokens 1 --format AMXINT8

Its formats: AMXINT4 and AMXINT8 (one scale per row, quantised from bf16 at load) and BF16.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.bf16 import normal
from benchmarks.operands import relative_error
from benchmarks.peers.common import expected, gaussian, layers_and_experts, parser, print_result, routed, timed

BYTES_PER_WEIGHT = {"AMXINT4": 0.5, "AMXINT8": 1, "BF16": 2}


def tensor(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view("int16")).view(torch.bfloat16)


class Layer:
    """One layer on kt-kernel's pool, called through its queue as its own wrapper does."""

    def __init__(self, pool: Any, options: Any, experts: int, seed: int) -> None:
        from kt_kernel import kt_kernel_ext

        # What the module holds is its own copy: these are given back as soon as it has them.
        shapes = [(options.intermediate, options.hidden)] * 2 + [(options.hidden, options.intermediate)]
        self.source = [gaussian((experts, *shape), seed=seed + i) for i, shape in enumerate(shapes)]
        mask = torch.zeros(experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            experts, options.topk, options.hidden, options.intermediate, mask.data_ptr()
        )
        config.layer_idx = 0
        config.max_len = -(-options.tokens // 64) * 64  # whole tiles
        config.pool = pool.backend_
        if options.format == "BF16":
            pointers = [[[of[expert].ctypes.data for expert in range(experts)]] for of in self.source]
            config.gate_projs, config.up_projs, config.down_projs = pointers
        else:
            config.gate_proj, config.up_proj, config.down_proj = (of.ctypes.data for of in self.source)
        kinds = {"AMXINT4": "AMXInt4_MOE", "AMXINT8": "AMXInt8_MOE", "BF16": "AMXBF16_MOE"}
        self.moe = getattr(kt_kernel_ext.moe, kinds[options.format])(config)
        order = torch.arange(experts, dtype=torch.int64)
        pool.submit(self.moe.load_weights_task(order.data_ptr()))
        pool.sync()
        self.pool, self.topk, self.kept = pool, options.topk, (mask, order, config)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        size = torch.tensor([x.shape[0]], dtype=torch.int32)
        self.pool.submit(
            self.moe.forward_task(
                size.data_ptr(), self.topk, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), False
            )
        )
        self.pool.sync()


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    import kt_kernel
    from kt_kernel import kt_kernel_ext

    options = parser("kt_experts", list(BYTES_PER_WEIGHT)).parse_args(arguments)
    torch.set_num_threads(1)
    workers = kt_kernel_ext.WorkerPoolConfig()
    workers.subpool_count = 1
    workers.subpool_numa_map = [0]
    workers.subpool_thread_count = [options.threads]
    pool = kt_kernel_ext.CPUInfer(workers)
    layers, experts = layers_and_experts(options, bytes_per_weight=BYTES_PER_WEIGHT[options.format])
    modules = []
    first_source = None
    for index in range(layers):
        modules.append(Layer(pool, options, experts, seed=10 * index))
        first_source = first_source or modules[0].source
        if index or not options.error:
            modules[-1].source = None
    bits = normal(options.tokens * options.hidden, std=1.0, seed=7).reshape(options.tokens, options.hidden)
    x, out = tensor(bits), torch.empty((options.tokens, options.hidden), dtype=torch.bfloat16)
    calls = routed(options, layers=layers, experts=experts)

    def call() -> int:
        made = next(calls)
        ids, weights = torch.from_numpy(made.ids), torch.from_numpy(made.weights)
        begin = time.perf_counter_ns()
        modules[made.layer].forward(x, ids, weights, out)
        return time.perf_counter_ns() - begin

    result = {
        "peer": f"kt-kernel {kt_kernel.__version__} {options.format}",
        **timed(call, seconds=options.seconds, warm_up=max(2, layers)),
        "layers": layers,
        "experts_resident": experts,
        "isa": kt_kernel.__cpu_variant__,
    }
    if options.error and first_source is not None:
        made = next(routed(options, layers=1, experts=experts))
        rows = min(options.tokens, 16)
        few = type(made)(0, made.ids[:rows].copy(), made.weights[:rows].copy(), made.distinct)
        modules[0].forward(x[:rows], torch.from_numpy(few.ids), torch.from_numpy(few.weights), out)
        result["error_unquantised"] = relative_error(
            out[:rows].float().numpy(), expected(bits[:rows], few, *first_source)
        )
    print_result(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
