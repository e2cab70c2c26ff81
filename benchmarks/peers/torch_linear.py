"""A linear layer in bf16 as torch runs it, copies in turn so that the weights come from memory.

python -m benchmarks.peers.torch_linear --in 4096 --out 4096 --tokens 512
"""

from __future__ import annotations

import argparse
import time
from itertools import cycle

import torch

from benchmarks import rotation
from benchmarks.bf16 import normal
from benchmarks.peers.common import ROTATION_BYTES, gaussian, print_result, timed


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.peers.torch_linear")
    for name, value in (("in", 4096), ("out", 4096), ("tokens", 1), ("threads", 2)):
        made.add_argument(f"--{name}", dest=f"{name}_", type=int, default=value)
    made.add_argument("--seconds", type=float, default=2.5)
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads_)
    size = options.in_ * options.out_ * 2
    weights = [
        torch.from_numpy(gaussian((options.out_, options.in_), seed=i).view("int16")).view(torch.bfloat16)
        for i in range(rotation.layers_for(size, at_least=ROTATION_BYTES))
    ]
    bits = normal(options.tokens_ * options.in_, std=1.0, seed=7).reshape(options.tokens_, options.in_)
    x = torch.from_numpy(bits.view("int16")).view(torch.bfloat16)
    turn = cycle(weights)

    def call() -> int:
        weight = next(turn)
        begin = time.perf_counter_ns()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter_ns() - begin

    print_result({"peer": "torch bf16", **timed(call, seconds=options.seconds), "layers": len(weights)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
