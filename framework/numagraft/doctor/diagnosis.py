"""All findings about one machine, printable and serialisable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numagraft.doctor.circumstances import Backend, Circumstances
from numagraft.doctor.finding import SEVERITIES, Finding
from numagraft.doctor.gpu import judge_gpus
from numagraft.doctor.measurement import Measurement
from numagraft.doctor.memory import judge_memory
from numagraft.doctor.process import judge_process
from numagraft.doctor.topology import judge_topology
from numagraft.platform import Node, Platform
from numagraft.platform.ids import format_list
from numagraft.platform.plain import to_plain
from numagraft.sizes import format_size

JUDGES: tuple[Callable[[Circumstances], Iterable[Finding]], ...] = (
    judge_topology,
    judge_memory,
    judge_process,
    judge_gpus,
)

_STYLES = {"hurts": "bold red", "advice": "yellow", "note": "dim"}


@dataclass(frozen=True)
class Diagnosis:
    """Findings, the worst first. `ok`: nothing hurts. `refused`: system call -> errno name, None where none was tried."""

    platform: Platform
    findings: tuple[Finding, ...]
    backend: Backend | None = None
    measurement: Measurement | None = None
    refused: Mapping[str, str] | None = None

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "hurts" for finding in self.findings)

    def to_json(self) -> str:
        """One line with ok, findings, backend and the whole platform, which `Platform.from_dump` reads back."""
        return json.dumps(
            {
                "ok": self.ok,
                "findings": to_plain(self.findings),
                "binding_allowed": None if self.refused is None else "mbind" not in self.refused,
                "refused": to_plain(self.refused),
                "backend": to_plain(self.backend),
                "measurement": to_plain(self.measurement),
                "platform": json.loads(self.platform.to_json()),
            }
        )

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        findings = Table.grid(padding=(0, 1))
        findings.add_column(justify="right", no_wrap=True)
        findings.add_column()
        for finding in self.findings:
            text = Text(finding.found)
            if finding.remedy:
                text.append(f"\n-> {finding.remedy}", style="dim" if finding.severity == "note" else "cyan")
            findings.add_row(Text(finding.severity, style=_STYLES[finding.severity]), text)
        count = sum(finding.severity == "hurts" for finding in self.findings)
        summary = "nothing here would hurt" if self.ok else f"{count} finding{'s' if count > 1 else ''} would hurt"
        return Group(
            Text(_headline(self), style="bold"),
            _nodes_table(self.platform),
            *_distances(self.platform),
            *([self.measurement] if self.measurement is not None else []),
            findings,
            Text(summary, style="bold green" if self.ok else "bold red"),
        )


def diagnose(circumstances: Circumstances, *, measurement: Measurement | None = None) -> Diagnosis:
    """Every judge's findings, by severity, then in the order of the judges."""
    findings = [finding for judge in JUDGES for finding in judge(circumstances)]
    findings += measurement.findings() if measurement is not None else []
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(circumstances.platform, tuple(findings), circumstances.backend, measurement, circumstances.refused)


def _headline(diagnosis: Diagnosis) -> str:
    platform, backend = diagnosis.platform, diagnosis.backend
    cores = platform.cores()
    parts = [
        platform.cpu.model or platform.cpu.vendor or "unknown CPU",
        f"{len(platform.sockets)} socket{'s' if len(platform.sockets) > 1 else ''}",
        f"{len(platform.nodes)} node{'s' if len(platform.nodes) > 1 else ''}",
        f"{len(cores)} usable core{'s' if len(cores) != 1 else ''}",
        f"kernels: {backend.isa}" if backend is not None and backend.isa else f"can run: {', '.join(platform.isa)}",
    ]
    if diagnosis.refused is not None:
        told = ", ".join(f"{call}: {outcome}" for call, outcome in diagnosis.refused.items())
        parts.append(f"refused: {told}" if told else "binding allowed (tried on one page)")
    return (f"{platform.source}: " if not platform.live else "") + " · ".join(parts)


def _nodes_table(platform: Platform) -> Any:
    from rich.table import Table

    huge = any(pages.total for node in platform.nodes for pages in node.huge_pages)
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("node", justify="right")
    table.add_column("socket", justify="right")
    table.add_column("CPUs")
    for name in ("cores", "memory", "available"):
        table.add_column(name, justify="right", no_wrap=True)
    if huge:
        table.add_column("huge pages free")
    table.add_column("used", no_wrap=True)
    for node in platform.nodes:
        pages = ", ".join(f"{p.free}/{p.total} x {format_size(p.page_bytes)}" for p in node.huge_pages if p.total)
        table.add_row(
            str(node.id),
            "-" if node.socket is None else str(node.socket),
            format_list(node.cpus) or "none",
            str(len(platform.cores(node.id, allowed=False))),
            format_size(node.total_bytes) if node.has_memory else "none",
            format_size(node.available_bytes),
            *([pages or "-"] if huge else []),
            _use(platform, node),
        )
    return table


def _distances(platform: Platform) -> list[Any]:
    from rich.text import Text

    if len(platform.nodes) < 2 or not all(node.distances for node in platform.nodes):
        return []
    ids = [node.id for node in platform.nodes]
    rows = [("distance", *map(str, ids))]
    rows += [(str(node.id), *(str(node.distances.get(id, "-")) for id in ids)) for node in platform.nodes]
    return [Text("\n".join(f"{row[0]:>8} " + "".join(f"{cell:>4}" for cell in row[1:]) for row in rows), style="dim")]


def _use(platform: Platform, node: Node) -> str:
    if node.id in platform.usable_nodes:
        return "yes"
    if node.id in platform.memory_only_nodes:
        return "when listed"
    if not node.has_memory:
        return "no: no memory"
    return "no: not allowed"
