"""The table that `benchmarks.suite` runs: every case, and what was aimed at for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.experts import SHAPES


@dataclass(frozen=True)
class Case:
    """One measurement. `aim` and `stretch` are the values of `figure` that were set as goals (None: none was).

    `fraction_of_limit` should be large; `share_of_torch`, our time over that of torch's grouped matmul in bf16, and
    `fork_join_us` small.
    """

    id: str
    group: str
    module: str  # run as `python -m benchmarks.<module>`
    arguments: tuple[str, ...]
    figure: str = "fraction_of_limit"
    aim: float | None = None
    stretch: float | None = None
    peers: tuple[str, ...] = field(default=())  # ids of the peers' cases that it is held against


def sizes(shape: str, tokens: int) -> tuple[str, ...]:
    named = {**SHAPES[shape], "tokens": tokens}
    return tuple(text for name, value in named.items() for text in (f"--{name}", str(value)))


def experts(
    shape: str, tokens: int, format: str, aim: float | None, stretch: float | None, *, isa: str | None = None
) -> Case:
    forced = ("--isa", isa) if isa else ()
    return Case(
        id=f"experts-{shape}-{tokens}-{format}" + (f"-{isa}" if isa else ""),
        group=f"experts {shape}, {tokens} token{'s' * (tokens > 1)}" + (f", {isa}" if isa else ""),
        module="experts",
        arguments=(*sizes(shape, tokens), "--format", format, *forced, "--error"),
        aim=aim,
        stretch=stretch,
        peers=tuple(f"{kind}-{shape}-{tokens}" for kind in PEER_OF[format] if shape in PEER_SHAPES),
    )


def linear(inputs: int, outputs: int, tokens: int, format: str, aim: float | None, stretch: float | None) -> Case:
    return Case(
        id=f"linear-{inputs}x{outputs}-{tokens}-{format}",
        group=f"linear {inputs}x{outputs}, {tokens} token{'s' * (tokens > 1)}",
        module="linear",
        arguments=(
            *("--in", str(inputs), "--out", str(outputs), "--tokens", str(tokens)),
            *("--format", format, "--error"),
        ),
        aim=aim,
        stretch=stretch,
        peers=(f"torch-linear-{inputs}x{outputs}-{tokens}",),
    )


#: the shapes that peers are measured in
PEER_SHAPES = ("A", "C")
#: whom a format is compared with: torch always in bf16, kt-kernel in what is nearest
PEER_OF = {
    "bf16": ("torch-experts", "kt-BF16"),
    "int8": ("torch-experts", "kt-AMXINT8"),
    "int4": ("torch-experts", "kt-AMXINT4"),
    "fp8": ("torch-experts",),
    "mxfp4": ("torch-experts",),
}


def all_cases() -> list[Case]:
    """Ours, in the order of the table."""
    found = [Case("limits", "limits", "limits", (), figure="fork_join_us", aim=3.0, stretch=1.0)]
    plain = ("int8", "int4", "bf16")
    found += [experts("A", 1, format, 0.85, 0.95) for format in plain]
    found += [experts("C", 1, format, 0.87, 0.96) for format in plain]
    found += [experts("B", 1, format, 0.87, 0.96) for format in plain]
    found += [experts("A", 1, format, 0.75, 0.90) for format in ("fp8", "mxfp4")]
    for outputs in (4096, 14336):
        found += [linear(4096, outputs, 1, format, 0.85, 0.95) for format in (*plain, "fp8", "mxfp4")]
    found += [experts("A", 1, format, 0.80, 0.92, isa="avx2") for format in (*plain, "fp8", "mxfp4")]
    aims = {
        ("A", 4): ((0.80, 0.92), (0.78, 0.88), (0.80, 0.92)),
        ("A", 16): ((0.80, 0.92), (0.72, 0.85), (0.80, 0.92)),
        ("A", 64): ((0.78, 0.90), (0.62, 0.80), (0.78, 0.90)),
        ("A", 256): ((0.68, 0.85), (0.54, 0.75), (0.66, 0.85)),
        ("A", 1024): ((0.45, 0.70), (0.30, 0.50), (0.46, 0.70)),
        ("C", 256): ((0.50, 0.70), (0.33, 0.55), (0.44, 0.66)),
        ("C", 1024): ((0.31, 0.50), (0.30, 0.50), (0.25, 0.45)),
    }
    for (shape, tokens), of_formats in aims.items():
        found += [experts(shape, tokens, format, *aim) for format, aim in zip(plain, of_formats, strict=True)]
    found += [
        linear(4096, 4096, 512, format, *aim)
        for format, aim in zip(plain, ((0.37, 0.55), (0.36, 0.55), (0.34, 0.50)), strict=True)
    ]
    for format, isa, aim, stretch in (
        ("int8", "avx512_vnni", 0.55, 0.40),
        ("int8", "avx2", 2.0, 1.5),
        ("int4", "avx2", 1.5, 1.15),
    ):
        found.append(replace(experts("A", 1024, format, aim, stretch, isa=isa), figure="share_of_torch"))
    found += [
        Case(f"decode-{format}", "SmolLM2", "decode", ("--format", format), figure="decode_speedup")
        for format in ("int8", "int4")
    ]
    return found


def peer_cases(ids: set[str]) -> list[Case]:
    """The peers' cases with those ids: torch in this interpreter, kt-kernel in another."""
    found = []
    for id in sorted(ids):
        kind, _, rest = id.rpartition("-")
        kind, _, shape = kind.rpartition("-")
        if kind == "torch-linear":
            inputs, _, outputs = shape.partition("x")
            arguments = ("--in", inputs, "--out", outputs, "--tokens", rest)
            found.append(Case(id, id, "peers.torch_linear", arguments, figure="us_median"))
        elif kind == "torch-experts":
            found.append(Case(id, id, "peers.torch_experts", (*sizes(shape, int(rest)), "--error"), figure="us_median"))
        else:
            format = kind.removeprefix("kt-")
            arguments = (*sizes(shape, int(rest)), "--format", format, "--error")
            found.append(Case(id, id, "peers.kt_experts", arguments, figure="us_median"))
    return found
