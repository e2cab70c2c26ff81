"""The suite's results as a table for people (Markdown) and a plot (PNG)."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.report import number

COLUMNS = ("case", "µs", "GB/s", "T op/s", "of the limit", "aim", "stretch", "met", "error", "unquantised", "weights")
COLUMNS += ("packing", "faster than")
TEXT_COLUMNS = ("case", "met", "faster than")


@dataclass(frozen=True)
class Row:
    """One case of ours. `ratios` maps a peer to how many times longer it takes, `peer_errors` to its error."""

    case: Case
    found: dict[str, Any]
    ratios: dict[str, float]
    peer_errors: dict[str, float]

    @property
    def figure(self) -> float | None:
        if self.case.figure == "share_of_torch":
            torch = [ratio for peer, ratio in self.ratios.items() if peer.startswith("torch")]
            return 1 / torch[0] if torch else None
        return self.found.get(self.case.figure)

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None where there is no figure or no aim."""
        if self.figure is None or self.case.aim is None:
            return None
        return self.figure >= self.case.aim if self.case.figure == "fraction_of_limit" else self.figure <= self.case.aim

    def cells(self) -> tuple[Any, ...]:
        if "failed" in self.found:
            return (self.case.id, *[None] * 4, self.case.aim, self.case.stretch, *[None] * 5, self.found["failed"])
        faster = ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in self.ratios.items())
        fraction = self.figure if self.case.figure != "fork_join_us" else None
        us = self.found.get("us_median") or self.found.get(self.case.figure)
        error = self.found.get("error_dequantised")
        return (
            self.case.id,
            us,
            self.found.get("weight_gbps", self.found.get("stream_gbps")),
            self.found.get("tops"),
            fraction,
            self.case.aim,
            self.case.stretch,
            self.met,
            error,
            self.found.get("error_unquantised"),
            self.found.get("error_weights"),
            self.found.get("packing_gb_per_s"),
            faster,
        )


def rows_of(cases: Sequence[Case], results: dict[str, Any]) -> list[Row]:
    """Each case beside the peers that ran; nothing is left out, failures included."""
    rows = []
    for case in cases:
        found = results[case.id]
        ratios, errors = {}, {}
        for peer in case.peers:
            other = results.get(peer, {})
            if "us_median" in other and "us_median" in found:
                ratios[other["peer"]] = other["us_median"] / found["us_median"]
                if "error_unquantised" in other:
                    errors[other["peer"]] = other["error_unquantised"]
        rows.append(Row(case, found, ratios, errors))
    return rows


def machine_lines() -> list[str]:
    """What the figures were measured on."""
    from numagraft.platform import Platform

    found = Platform.detect()
    return [
        f"- {found.cpu.model or platform.processor() or 'an unnamed CPU'}",
        f"- {len(found.nodes)} NUMA node(s), Linux {platform.release()}, Python {platform.python_version()}",
    ]


def write_docs(rows: Sequence[Row], results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes suite.md and, where matplotlib is installed, suite.png; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "suite.md"]
    written[0].write_text("\n".join(markdown(rows, results)) + "\n")
    measured = [row for row in rows if "failed" not in row.found and row.case.figure == "fraction_of_limit"]
    if measured:
        try:
            import matplotlib
        except ImportError:
            return written
        matplotlib.use("Agg")
        written.append(folder / "suite.png")
        plot(measured, written[1])
    return written


def markdown(rows: Sequence[Row], results: dict[str, Any]) -> list[str]:
    limits = results.get("limits", {})
    lines = [
        "# Figures of the benchmark suite",
        "",
        "Written by `python -m benchmarks.suite`. The limit of a case is the larger of its distinct weight bytes over the",
        "streaming read bandwidth and its operations over the multiply peak of the format on that ISA, both measured in",
        "the same process, in turns with the calls. Times are medians. `aim` and `stretch` are the goals that were set.",
        "`error` is the relative Frobenius error of a call's first tokens against fp32 with the dequantised weights,",
        "`unquantised` that with the weights before packing, as peers' errors are. `faster than` says how many times longer",
        "a peer takes for the same routing with its own weights; torch computes in bf16 whatever our format.",
        "Cases of 1,024 tokens on a forced ISA show our time over torch's instead, which should be small. `weights` is what",
        "packing loses on Gaussian weights, `packing` its speed in GB/s of bf16.",
        "",
        "Measured on:",
        "",
        *machine_lines(),
        "",
    ]
    if "stream_gbps" in limits:
        peaks = ", ".join(f"{name} {tops:.3g}" for name, tops in limits["peak_tops"].items())
        lines += [
            f"Streaming read {limits['stream_gbps']:.1f} GB/s with {limits['threads']} threads. Multiply peaks, T op/s:",
            f"{peaks}. One fork-join {limits['fork_join_us']:.2f} µs, with two barriers inside "
            f"{limits['fork_join_2_barriers_us']:.2f} µs.",
            "",
        ]
    lines += [
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" if name in TEXT_COLUMNS else "--:" for name in COLUMNS) + " |",
    ]
    layers = [row for row in rows if row.case.module in ("experts", "linear")]
    lines += ["| " + " | ".join(number(cell) for cell in row.cells()) + " |" for row in layers]
    lines += whole_models(results)
    peers = {id: found for id, found in results.items() if "peer" in found}
    if peers:
        lines += ["", "| peer | case | µs | error against unquantised weights |", "| --- | --- | --: | --: |"]
        lines += [
            f"| {found['peer']} | {id} | {number(found['us_median'])} | {number(found.get('error_unquantised'))} |"
            for id, found in sorted(peers.items())
        ]
    return lines


def whole_models(results: dict[str, Any]) -> list[str]:
    """SmolLM2's tokens per second, ours beside transformers in one process."""
    lines: list[str] = []
    for _, found in sorted(results.items()):
        if "grafted" not in found:
            continue
        lines = lines or [
            "",
            "| SmolLM2 | numagraft, tokens/s | transformers, tokens/s | ratio |",
            "| --- | --: | --: | --: |",
        ]
        for phase, of_phase in found["grafted"].items():
            for key, rate in of_phase.items():
                what = f"{key} tokens" if phase == "prefill" else f"batch {key}"
                peer = found.get("transformers", {}).get(phase, {}).get(key)
                ratio = rate / peer if peer else None
                lines.append(
                    f"| {found['format']}, {phase}, {what} | {number(rate)} | {number(peer)} | {number(ratio)} |"
                )
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Left: the fraction of the limit, with aim and stretch as ticks. Right: how many times longer the peers take."""
    from matplotlib import pyplot

    height = 1.2 + 0.26 * len(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, height), sharey=True, width_ratios=(3, 2))
    colours = {"int8": "#3b6ea5", "int4": "#d08a2e", "bf16": "#5a9367", "fp8": "#8b5fa3", "mxfp4": "#b0524c"}
    places = list(range(len(rows)))
    for place, row in zip(places, rows, strict=True):
        left.barh(place, row.figure, color=colours.get(row.found.get("format", ""), "grey"), height=0.7)
        for goal, colour in ((row.case.aim, "black"), (row.case.stretch, "#999999")):
            if goal is not None:
                left.plot([goal, goal], [place - 0.4, place + 0.4], color=colour, linewidth=2)
    left.set_yticks(places, [row.case.id for row in rows], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1.05)
    left.set_xlabel("fraction of the machine's limit (black: aim, grey: stretch)")
    names = sorted({peer for row in rows for peer in row.ratios})
    markers = "osD^vP*X"
    for index, name in enumerate(names):
        points = [(row.ratios[name], place) for place, row in zip(places, rows, strict=True) if name in row.ratios]
        right.scatter(*zip(*points, strict=True), marker=markers[index % len(markers)], s=26, label=name)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("times longer than numagraft")
    if names:
        right.set_xscale("log")
        right.legend(fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    left.legend(handles, list(colours), fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
