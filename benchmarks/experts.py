"""One layer of experts: time per call beside what the machine's memory and multipliers allow.

    python -m benchmarks.experts --hidden 2048 --intermediate 768 --experts 128 --topk 8 --tokens 1 --threads 2 \\
        --format int8 --json

Weights of several layers are used in turn, more than 2 GiB, so that they come from memory. Where one layer with all its
experts does not fit `--memory-gib`, fewer experts are kept: `experts_resident`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import machine, rotation
from benchmarks.operands import WeightSource, experts_in_fp32, from_bf16, inputs, relative_error, view
from benchmarks.report import emit
from benchmarks.sampling import Prepared, Sampling, Work, sample

ROTATION_BYTES = 2.1 * 2**30
#: shapes of KERNELS tables and published models, by the letter the tables use
SHAPES = {
    "A": {"hidden": 2048, "intermediate": 768, "experts": 128, "topk": 8},
    "B": {"hidden": 7168, "intermediate": 2048, "experts": 256, "topk": 8},
    "C": {"hidden": 4096, "intermediate": 14336, "experts": 8, "topk": 2},
}


def add_operator_options(made: argparse.ArgumentParser) -> None:
    """What `experts` and `linear` have in common."""
    made.add_argument("--tokens", type=int, default=1)
    made.add_argument("--format", default="int8", help="bf16, int8, int4, fp8 or mxfp4")
    made.add_argument("--group", type=int, default=32, help="inputs per scale (int4)")
    made.add_argument("--symmetric", action="store_true", help="no minimum per group (int4)")
    made.add_argument("--activations", default="auto", help="auto, int8 or bf16")
    made.add_argument("--placement", default="auto", help="auto, shard, mirror, interleave or bind")
    made.add_argument("--threads", type=int, help="threads of all nodes together (default: every core)")
    made.add_argument("--isa", help="force a kernel row: scalar, avx2, avx512, avx512_vnni, amx")
    made.add_argument("--memory-gib", type=float, default=3.0, help="most memory for packed weights (default 3)")
    made.add_argument("--rounds", type=int, default=5, help="turns of measuring limits and calls")
    made.add_argument("--seconds", type=float, default=0.5, help="of calls per round")
    made.add_argument("--error", action="store_true", help="also compare one call with fp32")
    made.add_argument("--json", action="store_true", help="print only the JSON line")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.split("\n")[0])
    made.add_argument("--shape", choices=sorted(SHAPES), help="A, B or C of the tables, instead of the four sizes")
    for name in ("hidden", "intermediate", "experts", "topk"):
        made.add_argument(f"--{name}", type=int, help=f"default: {SHAPES['A'][name]}")
    add_operator_options(made)
    return made


def prepare(options: argparse.Namespace) -> list[str]:
    """Fills in the sizes of `--shape`; returns what is wrong with the arguments, in words."""
    for name, value in SHAPES[options.shape or "A"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    found = [
        f"--{name} is {getattr(options, name)}: expected at least 1"
        for name in ("hidden", "intermediate", "experts", "topk", "tokens", "rounds")
        if getattr(options, name) < 1
    ]
    if options.topk > options.experts:
        found.append(f"--topk is {options.topk}: expected at most --experts ({options.experts})")
    return found


def layer_weights(
    options: argparse.Namespace, runtime: Any, source: WeightSource, *, experts: int, owner: str
) -> tuple[Any, float, list[list[np.ndarray]]]:
    """One packed layer with every weight loaded, the seconds that packing took (placing the memory not counted), and what it
    was packed from: gate, up and down, by expert."""
    from numagraft import native

    made = native.ExpertsWeights(
        runtime,
        experts=experts,
        hidden=options.hidden,
        intermediate=options.intermediate,
        format=native.WeightFormat(options.format, options.group, options.symmetric, options.activations),
        gate=native.Gate(),
        parts=machine.parts(options.placement, options.intermediate, runtime.layout),
        has_bias=False,
        owner=owner,
    )
    seconds = 0.0
    origin: list[list[np.ndarray]] = [[], [], []]
    # A few experts at a time: enough for every thread, and no list of views that outlives its arrays.
    for first in range(0, experts, 8):
        count = min(8, experts - first)
        arrays = [
            [source.matrix(rows, columns) for _ in range(count)]
            for rows, columns in (
                (options.intermediate, options.hidden),
                (options.intermediate, options.hidden),
                (options.hidden, options.intermediate),
            )
        ]
        gate, up, down = ([view(array, dtype="bf16") for array in listed] for listed in arrays)
        begin = time.perf_counter()
        made.load_experts(gate=gate, up=up, down=down, first_expert=first)
        seconds += time.perf_counter() - begin
        for kept, new in zip(origin, arrays, strict=True):
            kept += new
    return made, seconds, origin


def work_of(options: argparse.Namespace, *, distinct: int, expert_bytes: float) -> Work:
    multiplications = options.tokens * options.topk * 3 * options.hidden * options.intermediate
    return Work(weight_bytes=distinct * expert_bytes, operations=2.0 * multiplications)


def prepared_calls(options: argparse.Namespace, layers: list[Any], *, experts: int) -> Iterator[Prepared]:
    expert_bytes = sum(layer.packed_bytes for layer in layers) / len(layers) / experts
    xs = inputs(options.tokens, options.hidden, count=4)
    out = np.empty((options.tokens, options.hidden), dtype=np.uint16)
    forwards = [layer.forward_rows for layer in layers]  # as the operator calls it
    for made in rotation.calls(layers=len(layers), experts=experts, topk=options.topk, tokens=options.tokens):
        x = next(xs)

        addresses = (x.ctypes.data, "bf16", options.tokens, made.ids.ctypes.data, options.topk)
        addresses += (made.weights.ctypes.data, "f32", out.ctypes.data)

        def call(forward: Any = forwards[made.layer], addresses: tuple = addresses, alive: Any = (x, made)) -> None:
            forward(*addresses)

        yield call, work_of(options, distinct=made.distinct, expert_bytes=expert_bytes)


def errors(
    options: argparse.Namespace, layer: Any, origin: list[list[np.ndarray]], *, experts: int
) -> dict[str, float]:
    """Relative Frobenius errors of one call's first tokens (up to 16) against fp32: with the dequantised weights, which
    leaves what the call itself loses, and with the weights before they were packed."""
    from numagraft.native import Matrix

    tokens = options.tokens
    made = next(rotation.calls(layers=1, experts=experts, topk=options.topk, tokens=tokens, seed=3))
    x = next(inputs(tokens, options.hidden, count=1, seed=99))
    out = np.empty((tokens, options.hidden), dtype=np.float32)
    ids = Matrix(made.ids.ctypes.data, "i64", tokens, options.topk, options.topk)
    layer.forward(view(x, dtype="bf16"), ids, view(made.weights, dtype="f32"), view(out, dtype="f32"))
    compared = slice(0, 16)
    chosen = made.ids[compared]
    unpacked: list[dict[int, np.ndarray]] = []
    for unpack, shape in (
        (layer.unpack_gate, (options.intermediate, options.hidden)),
        (layer.unpack_up, (options.intermediate, options.hidden)),
        (layer.unpack_down, (options.hidden, options.intermediate)),
    ):
        of_expert: dict[int, np.ndarray] = {}
        for expert in np.unique(chosen):
            of_expert[expert] = np.empty(shape, dtype=np.float32)
            unpack(int(expert), view(of_expert[expert], dtype="f32"))
        unpacked.append(of_expert)
    before = [{int(expert): from_bf16(of[expert]) for expert in np.unique(chosen)} for of in origin]
    return {
        name: relative_error(
            out[compared], experts_in_fp32(from_bf16(x[compared]), chosen, made.weights[compared], *of)
        )
        for name, of in (("error_dequantised", unpacked), ("error_unquantised", before))
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    from numagraft import native
    from numagraft.native.limits import regions_of

    runtime = native.Runtime(machine.layout(options.threads))
    source = WeightSource(options.hidden * options.intermediate)
    part = max(1, min(options.experts, options.topk))
    probe = native.experts_packed_bytes(
        part,
        options.hidden,
        options.intermediate,
        native.WeightFormat(options.format, options.group, options.symmetric, options.activations),
        False,
        machine.parts("bind", options.intermediate, runtime.layout),
    )
    expert_bytes = sum(probe) / part
    experts = max(part, min(options.experts, int(options.memory_gib * 2**30 // expert_bytes)))
    count = rotation.layers_for(int(expert_bytes * experts), at_least=min(ROTATION_BYTES, options.memory_gib * 2**30))
    if count > 1 and count * experts * expert_bytes > options.memory_gib * 2**30:
        count -= 1
    made = [layer_weights(options, runtime, source, experts=experts, owner=f"layers.{i}.experts") for i in range(count)]
    layers, packing = [layer for layer, _, _ in made], sum(seconds for _, seconds, _ in made)
    packed = sum(layer.packed_bytes for layer in layers)
    weights = 3 * options.hidden * options.intermediate * experts * count
    figures = sample(
        prepared_calls(options, layers, experts=experts),
        runtime,
        regions_of(buffer for layer in layers for buffer in layer.buffers()),
        kind=options.format,
        isa=native.capabilities().isa,
        activations=options.activations,
        warm_up=max(count, 2),
        sampling=Sampling(rounds=options.rounds, seconds=options.seconds),
    )
    return {
        **figures,
        "hidden": options.hidden,
        "intermediate": options.intermediate,
        "experts": options.experts,
        "experts_resident": experts,
        "topk": options.topk,
        "tokens": options.tokens,
        "format": options.format,
        "activations": options.activations,
        "threads": sum(node.threads for node in runtime.layout.nodes),
        "layers": count,
        "packed_gib": packed / 2**30,
        "bits_per_weight": packed * 8 / weights,
        "packing_gb_per_s": weights * 2 / 1e9 / packing,
        **(errors(options, layers[0], made[0][2], experts=experts) if options.error else {}),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if problems := prepare(options):
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
