"""One linear layer: time per call beside what the machine's memory and multipliers allow.

    python -m benchmarks.linear --in 4096 --out 4096 --tokens 1 --threads 2 --format int8 --json

Copies of the layer with more than 2 GiB together are used in turn, so that the weights come from memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks import machine, rotation
from benchmarks.experts import ROTATION_BYTES, add_operator_options
from benchmarks.operands import WeightSource, from_bf16, inputs, relative_error, view
from benchmarks.report import emit
from benchmarks.sampling import Prepared, Sampling, Work, sample


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.split("\n")[0])
    made.add_argument("--in", dest="in_features", type=int, default=4096)
    made.add_argument("--out", dest="out_features", type=int, default=4096)
    add_operator_options(made)
    return made


def layer_weights(options: argparse.Namespace, runtime: Any, source: WeightSource, *, owner: str) -> tuple[Any, float]:
    """One packed layer, and the seconds that packing took (placing the memory not counted)."""
    from numagraft import native

    made = native.LinearWeights(
        runtime,
        out_features=options.out_features,
        in_features=options.in_features,
        format=native.WeightFormat(options.format, options.group, options.symmetric, options.activations),
        parts=machine.parts(options.placement, options.out_features, runtime.layout),
        has_bias=False,
        owner=owner,
    )
    weight = source.matrix(options.out_features, options.in_features)
    given = view(weight, dtype="bf16")
    begin = time.perf_counter()
    made.load_weight(given)
    return made, time.perf_counter() - begin


def prepared_calls(options: argparse.Namespace, layers: list[Any]) -> Iterator[Prepared]:
    work = Work(
        weight_bytes=sum(layer.packed_bytes for layer in layers) / len(layers),
        operations=2.0 * options.tokens * options.in_features * options.out_features,
    )
    out = np.empty((options.tokens, options.out_features), dtype=np.uint16)
    given = inputs(options.tokens, options.in_features, count=4)
    forwards = cycle([layer.forward_rows for layer in layers])  # as the operator calls it
    for forward, x in zip(forwards, given, strict=False):
        addresses = (x.ctypes.data, "bf16", options.tokens, out.ctypes.data)

        def call(forward: Any = forward, addresses: tuple = addresses, alive: Any = x) -> None:
            forward(*addresses)

        yield call, work


def errors(options: argparse.Namespace, layer: Any) -> dict[str, float]:
    """Relative Frobenius errors: of one call's first tokens (up to 64) against fp32 with the dequantised weights, and of
    those weights against the Gaussian ones that were packed."""
    tokens = options.tokens
    x = next(inputs(tokens, options.in_features, count=1, seed=99))
    out = np.empty((tokens, options.out_features), dtype=np.float32)
    layer.forward(view(x, dtype="bf16"), view(out, dtype="f32"))
    weight = np.empty((options.out_features, options.in_features), dtype=np.float32)
    layer.unpack(view(weight, dtype="f32"))
    first = WeightSource(options.in_features * options.out_features).matrix(options.out_features, options.in_features)
    return {
        "error_dequantised": relative_error(out[:64], from_bf16(x[:64]) @ weight.T),
        "error_weights": relative_error(weight, from_bf16(first)),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    from numagraft import native
    from numagraft.native.limits import regions_of

    runtime = native.Runtime(machine.layout(options.threads))
    source = WeightSource(options.in_features * options.out_features)
    made = [layer_weights(options, runtime, source, owner="layers.0.linear")]
    limit = min(ROTATION_BYTES, options.memory_gib * 2**30)
    count = rotation.layers_for(made[0][0].packed_bytes, at_least=limit)
    made += [layer_weights(options, runtime, source, owner=f"layers.{i}.linear") for i in range(1, count)]
    layers, packing = [layer for layer, _ in made], sum(seconds for _, seconds in made)
    packed = sum(layer.packed_bytes for layer in layers)
    weights = options.in_features * options.out_features * count
    figures = sample(
        prepared_calls(options, layers),
        runtime,
        regions_of(buffer for layer in layers for buffer in layer.buffers()),
        kind=options.format,
        isa=native.capabilities().isa,
        activations=options.activations,
        warm_up=min(count, 8),
        sampling=Sampling(rounds=options.rounds, seconds=options.seconds),
    )
    return {
        **figures,
        "in": options.in_features,
        "out": options.out_features,
        "tokens": options.tokens,
        "format": options.format,
        "activations": options.activations,
        "threads": sum(node.threads for node in runtime.layout.nodes),
        "layers": count,
        "packed_gib": packed / 2**30,
        "bits_per_weight": packed * 8 / weights,
        "packing_gb_per_s": weights * 2 / 1e9 / packing,
        **(errors(options, layers[0]) if options.error else {}),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    sizes = {"--in": options.in_features, "--out": options.out_features, "--tokens": options.tokens}
    if problems := [f"{name} is {size}: expected at least 1" for name, size in sizes.items() if size < 1]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    machine.force_isa(options.isa)
    from numagraft.errors import NumagraftError

    try:
        result = run(options)
    except NumagraftError as error:
        print(error, file=sys.stderr)
        return 2
    emit(result, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
