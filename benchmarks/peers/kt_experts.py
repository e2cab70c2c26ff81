"""Experts as kt-kernel runs them, with an interpreter that has kt-kernel, torch and numpy.

    PYTHONPATH=. KT_PYTHON -m benchmarks.peers.kt_experts --tokens 1 --format AMXINT8

Its formats: AMXINT4 and AMXINT8 (one scale per row, quantised from bf16 at load; not for CPUs without AVX-512) and BF16. Its
queue has a thread that spins beside the workers; where that takes a core from them one worker less is faster. Both are
measured, the faster is its figure.
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
    """One layer on kt-kernel's pool, called through its queue as its own wrapper does; it holds a copy of `source`."""

    def __init__(self, pool: Any, options: Any, experts: int, source: list[np.ndarray]) -> None:
        import kt_kernel
        from kt_kernel import kt_kernel_ext

        mask = torch.zeros(experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            experts, options.topk, options.hidden, options.intermediate, mask.data_ptr()
        )
        config.layer_idx = 0
        config.max_len = -(-options.tokens // 64) * 64  # whole tiles
        config.pool = pool.backend_
        if options.format == "BF16":
            pointers = [[[of[expert].ctypes.data for expert in range(experts)]] for of in source]
            config.gate_projs, config.up_projs, config.down_projs = pointers
        else:
            config.gate_proj, config.up_proj, config.down_proj = (of.ctypes.data for of in source)
        kinds = {"AMXINT4": ["AMXInt4_MOE"], "AMXINT8": ["AMXInt8_MOE"], "BF16": ["AMXBF16_MOE", "AVX2BF16_MOE"]}
        built = [kind for kind in kinds[options.format] if hasattr(kt_kernel_ext.moe, kind)]
        if not built:
            raise SystemExit(f"kt-kernel has no {options.format} for this CPU (its variant: {kt_kernel.__cpu_variant__})")
        self.moe = getattr(kt_kernel_ext.moe, built[0])(config)
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


def pool_of(threads: int) -> Any:
    from kt_kernel import kt_kernel_ext

    workers = kt_kernel_ext.WorkerPoolConfig()
    workers.subpool_count = 1
    workers.subpool_numa_map = [0]
    workers.subpool_thread_count = [threads]
    return kt_kernel_ext.CPUInfer(workers)


def measure(options: Any, source: list[np.ndarray], *, threads: int, layers: int, experts: int) -> dict[str, Any]:
    """Times with that many workers, and the error of a call."""
    pool = pool_of(threads)
    modules = [Layer(pool, options, experts, source) for _ in range(layers)]
    bits = normal(options.tokens * options.hidden, std=1.0, seed=7).reshape(options.tokens, options.hidden)
    x, out = tensor(bits), torch.empty((options.tokens, options.hidden), dtype=torch.bfloat16)
    calls = routed(options, layers=layers, experts=experts)

    def call() -> int:
        made = next(calls)
        ids, weights = torch.from_numpy(made.ids), torch.from_numpy(made.weights)
        begin = time.perf_counter_ns()
        modules[made.layer].forward(x, ids, weights, out)
        return time.perf_counter_ns() - begin

    result = {**timed(call, seconds=options.seconds, warm_up=max(2, layers)), "threads": threads}
    if options.error:
        made = next(routed(options, layers=1, experts=experts))
        rows = min(options.tokens, 16)
        few = type(made)(0, made.ids[:rows].copy(), made.weights[:rows].copy(), made.distinct)
        modules[0].forward(x[:rows], torch.from_numpy(few.ids), torch.from_numpy(few.weights), out)
        result["error_unquantised"] = relative_error(out[:rows].float().numpy(), expected(bits[:rows], few, *source))
    return result


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    import kt_kernel

    options = parser("kt_experts", list(BYTES_PER_WEIGHT)).parse_args(arguments)
    torch.set_num_threads(1)
    layers, experts = layers_and_experts(options, bytes_per_weight=BYTES_PER_WEIGHT[options.format])
    shapes = [(options.intermediate, options.hidden)] * 2 + [(options.hidden, options.intermediate)]
    source = [gaussian((experts, *shape), seed=i) for i, shape in enumerate(shapes)]
    tried = [
        measure(options, source, threads=threads, layers=layers, experts=experts)
        for threads in sorted({options.threads, max(1, options.threads - 1)})
    ]
    print_result(
        {
            "peer": f"kt-kernel {kt_kernel.__version__} {options.format}",
            **min(tried, key=lambda found: found["us_median"]),
            "us_by_threads": {str(found["threads"]): found["us_median"] for found in tried},
            "layers": layers,
            "experts_resident": experts,
            "isa": kt_kernel.__cpu_variant__,
        }
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
