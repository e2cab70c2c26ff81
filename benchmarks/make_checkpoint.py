"""Writes a checkpoint of random bf16 weights with a published model's layer shapes.

python -m benchmarks.make_checkpoint --arch qwen3_moe --layers 10 OUT
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.random_checkpoint import ARCHITECTURES, Shape, checkpoint_bytes, write_checkpoint
from benchmarks.report import emit


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.make_checkpoint", description=__doc__.split("\n")[0])
    made.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist or is empty")
    made.add_argument("--arch", choices=sorted(ARCHITECTURES), default="qwen3_moe")
    made.add_argument("--layers", type=int, help="decoder layers (default: the published model's)")
    made.add_argument("--at-least-gib", type=float, help="as many layers as reach this size, instead of --layers")
    for name in (
        "hidden",
        "intermediate",
        "moe-intermediate",
        "experts",
        "topk",
        "heads",
        "kv-heads",
        "head-dim",
        "vocab",
    ):
        made.add_argument(f"--{name}", type=int, help="default: the published model's")
    made.add_argument("--shard-gib", type=float, default=4.0, help="largest shard (default 4)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", action="store_true", help="print only the JSON line")
    return made


def shape_of(options: argparse.Namespace) -> Shape:
    """The published model's sizes with what was asked for in their place."""
    shape = ARCHITECTURES[options.arch].shape
    asked = {name: getattr(options, name) for name in vars(shape) if getattr(options, name) is not None}
    shape = replace(shape, **asked)
    if options.at_least_gib is not None:
        shape = with_layers_for(options.arch, shape, gib=options.at_least_gib)
    return shape


def with_layers_for(arch: str, shape: Shape, *, gib: float) -> Shape:
    """The fewest layers with which the checkpoint takes at least `gib`."""
    one, two = (checkpoint_bytes(arch, replace(shape, layers=layers)) for layers in (1, 2))
    missing = gib * 2**30 - one
    return replace(shape, layers=max(1, 1 + -int(-missing // (two - one))))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.layers is not None and options.at_least_gib is not None:
        print("--layers and --at-least-gib exclude each other: give one", file=sys.stderr)
        return 2
    try:
        result = write_checkpoint(
            options.out,
            arch=options.arch,
            shape=shape_of(options),
            shard_bytes=int(options.shard_gib * 2**30),
            seed=options.seed,
            on_shard=None if options.json else lambda index, size: print(f"shard {index}: {size / 2**30:.2f} GiB"),
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    emit(result, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
