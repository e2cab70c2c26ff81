"""The proof: where every placed page was asked to be, and where the kernel says it is. Imports no torch."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numagraft.errors import PlacementError, Problem
from numagraft.placement import Placement
from numagraft.platform.ids import format_list
from numagraft.platform.kernel import read_numa_balancing
from numagraft.platform.plain import to_plain
from numagraft.platform.tree import FolderTree
from numagraft.runtime import RuntimeLayout
from numagraft.sizes import format_size

if TYPE_CHECKING:
    from numagraft.native import ArenaReport, PageCount, PlacedBuffer

#: Interleaved pages may be uneven by this share, or by one page.
UNEVEN_SHARE = 0.01

_PROBLEMS_SHOWN = 40


@dataclass(frozen=True)
class PlacedWeight:
    """One grafted module and the buffers that hold its packed weights; `planned`: runtime node -> bytes, as the plan said."""

    rule_id: str
    module: str
    placement: Placement
    buffers: Sequence[PlacedBuffer]
    planned: Mapping[int, int] | None = None


class PlacedRuntime(Protocol):
    """What the report asks of a `numagraft.native.Runtime`."""

    @property
    def layout(self) -> RuntimeLayout: ...
    def memory_report(self) -> Sequence[ArenaReport]: ...
    def survey(self, buffers: Sequence[PlacedBuffer]) -> tuple[Sequence[PageCount], Sequence[ArenaReport]]: ...


@dataclass(frozen=True)
class NodeRow:
    """One rule's memory on one node. `node` is the kernel's id, an index where the layout is virtual.

    `page_bytes` is bytes by page size; where an arena mixes sizes, in proportion. `found_bytes` is None when the kernel
    did not tell, or need not be asked (virtual).
    """

    rule_id: str
    node: int
    policies: tuple[str, ...]
    modules: int
    replicas: tuple[int, int]  # fewest and most copies of any of the rule's modules
    asked_bytes: int
    found_bytes: int | None
    page_bytes: Mapping[int, int]
    cpus: tuple[int, ...]
    obtained: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class Misplacement:
    """Pages of one module that are not where they were asked to be; `found` None: in memory nowhere."""

    module: str
    rule_id: str
    asked: tuple[int, ...]
    found: int | None
    pages: int
    page_bytes: int
    interleaved: bool = False

    @property
    def message(self) -> str:
        asked = f"node{'s' if len(self.asked) > 1 else ''} {format_list(self.asked)}"
        amount = f"{self.pages} pages ({format_size(self.pages * self.page_bytes)})"
        if self.found is None:
            return f"{amount} asked for {asked} are not in memory"
        if self.interleaved and self.found in self.asked:
            return f"asked to be even over {asked}, but {amount} too many are on node {self.found}"
        return f"{amount} asked for {asked} are on node {self.found}"


@dataclass(frozen=True)
class PlacementReport:
    """What was asked and what was found, per rule and node; `str()` is a table, `to_json()` plain data."""

    rows: tuple[NodeRow, ...]
    virtual: bool
    misplaced: tuple[Misplacement, ...] = ()
    incomplete: tuple[Problem, ...] = ()  # modules whose buffers are not those that their placement says
    unverified: tuple[str, ...] = ()  # modules of which the kernel tells nothing, with the reason
    methods: tuple[str, ...] = ()  # how the kernel was asked
    arenas: int = 0
    fallbacks: tuple[str, ...] = ()
    page_cache_residue: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Every page was found where it was asked to be. A virtual runtime binds nothing: only its buffers are counted."""
        return not self.misplaced and not self.incomplete and not self.unverified

    @property
    def asked_bytes(self) -> int:
        return sum(row.asked_bytes for row in self.rows)

    @property
    def verdict(self) -> str:
        if self.incomplete:
            return f"WRONG: {len(self.incomplete)} buffers missing or too many"
        if self.virtual:
            return "virtual: not bound"
        if self.misplaced:
            modules = len({item.module for item in self.misplaced})
            return f"WRONG: {modules} module{'s' if modules > 1 else ''} with pages elsewhere"
        if self.unverified:
            return f"NOT VERIFIED: {len(self.unverified)} modules"
        if not self.rows:
            return "nothing was placed"
        return f"as asked: {format_size(self.asked_bytes)} verified by {', '.join(self.methods)}"

    def require(self) -> PlacementReport:
        """Itself when `ok`; else raises PlacementError with every module, the nodes asked and found, and a remedy."""
        if self.ok:
            return self
        problems = [*self.incomplete]
        problems += [Problem(item.module, item.message, _remedy(item)) for item in self.misplaced]
        problems += [
            Problem(
                text,
                "the kernel does not tell where its pages are",
                "allow move_pages or /proc/self/numa_maps in the container (--cap-add SYS_NICE), or set strict: false",
            )
            for text in self.unverified
        ]
        if len(problems) > _PROBLEMS_SHOWN:
            rest = len(problems) - _PROBLEMS_SHOWN
            problems = [*problems[:_PROBLEMS_SHOWN], Problem("", f"and {rest} more")]
        raise PlacementError(f"the placement is not what was asked for ({self.verdict})", problems)

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps, with `ok` and `verdict`."""
        return {"ok": self.ok, "verdict": self.verdict, "asked_bytes": self.asked_bytes, **to_plain(self)}

    def __rich__(self) -> Any:
        return _table(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(_table(self))
        return capture.get().rstrip()


def build_report(
    placed: Iterable[PlacedWeight],
    runtime: PlacedRuntime,
    *,
    page_cache_residue: int | None = None,
    fallbacks: Sequence[str] = (),
) -> PlacementReport:
    """Asks the kernel for every page of every buffer.

    page_cache_residue: bytes of the checkpoint that the page cache still holds; fallbacks: what was not done as the rules
    first said, for people.
    """
    layout = runtime.layout
    weights = list(placed)
    buffers = [buffer for weight in weights for buffer in weight.buffers]
    found: Sequence[PageCount | None] = [None] * len(buffers)
    if layout.bound and buffers:
        # In one go: the runtime reads smaps once, and keeps the answers for the operators' remote-byte counters.
        found, arenas = runtime.survey(buffers)
    else:
        arenas = runtime.memory_report()
    counts = iter(found)
    survey = _Survey(layout, sorted(arenas, key=lambda arena: arena.address))
    for weight in weights:
        survey.add(weight, [next(counts) for _ in weight.buffers])
    refused = sorted({f"mbind is refused ({arena.refused}): {arena.obtained}" for arena in arenas if arena.refused})
    return PlacementReport(
        rows=survey.rows(),
        virtual=not layout.bound,
        misplaced=tuple(survey.misplaced),
        incomplete=tuple(survey.incomplete),
        unverified=tuple(survey.unverified),
        methods=tuple(sorted(survey.methods)),
        arenas=len(arenas),
        fallbacks=(*fallbacks, *refused),
        page_cache_residue=page_cache_residue,
        notes=layout.notes,
    )


@dataclass
class _Account:
    """One rule on one runtime node, while it is being added up."""

    asked: int = 0
    found: int = 0
    known: bool = True
    modules: set[str] = field(default_factory=set)
    pages: dict[int, int] = field(default_factory=dict)
    obtained: set[str] = field(default_factory=set)
    wrong: bool = False


class _Survey:
    def __init__(self, layout: RuntimeLayout, arenas: Sequence[ArenaReport]) -> None:
        self._layout = layout
        self._arenas = arenas
        self._starts = [arena.address for arena in arenas]
        self._accounts: dict[tuple[str, int], _Account] = {}
        self._policies: dict[str, set[str]] = {}
        self._replicas: dict[str, list[int]] = {}
        self.misplaced: list[Misplacement] = []
        self.incomplete: list[Problem] = []
        self.unverified: list[str] = []
        self.methods: set[str] = set()

    def _node(self, index: int) -> int:
        os_node = self._layout.nodes[index].os_node
        return index if os_node is None else os_node

    def _account(self, rule_id: str, node: int) -> _Account:
        return self._accounts.setdefault((rule_id, node), _Account())

    def add(self, weight: PlacedWeight, counts: Sequence[PageCount | None]) -> None:
        """`counts` of the weight's buffers; None where nothing was asked (a virtual layout)."""
        self._policies.setdefault(weight.rule_id, set()).add(weight.placement.policy)
        self._replicas.setdefault(weight.rule_id, []).append(weight.placement.replicas)
        self._compare(weight)
        wrong: dict[tuple[tuple[int, ...], int | None, bool, int], int] = {}
        doubts: set[str] = set()
        for buffer, count in zip(weight.buffers, counts, strict=True):
            nodes = tuple(self._node(index) for index in buffer.nodes)
            arena = self._arena_of(buffer.address)
            shares = _asked_bytes(buffer, nodes, count)
            for node, share in shares.items():
                account = self._account(weight.rule_id, node)
                account.asked += share
                account.modules.add(weight.module)
                if arena is not None:
                    account.obtained.add(arena.obtained)
            if count is None:
                continue
            self.methods.add(count.method)
            told = sum(count.per_node.values()) + count.absent
            if count.method == "unverifiable" or not count.exact or told * count.page_bytes < buffer.bytes:
                doubts.add(count.method)
                for node in nodes:
                    self._account(weight.rule_id, node).known = False
                continue
            # smaps tells of whole mappings: of an arena, not of one buffer in it.
            sizes = arena.page_bytes if arena is not None else {}
            for key, pages in self._judge(buffer, nodes, count, sizes).items():
                wrong[key] = wrong.get(key, 0) + pages
                for node in nodes:
                    self._account(weight.rule_id, node).wrong = True
            for node, pages in count.per_node.items():
                account = self._account(weight.rule_id, node)
                account.found += pages * count.page_bytes
                account.modules.add(weight.module)
                _add_sizes(account.pages, pages * count.page_bytes, sizes)
        for (asked, found, interleaved, page_bytes), pages in wrong.items():
            self.misplaced.append(
                Misplacement(weight.module, weight.rule_id, asked, found, pages, page_bytes, interleaved)
            )
        if doubts:
            self.unverified.append(f"{weight.module} ({', '.join(sorted(doubts))})")

    def _compare(self, weight: PlacedWeight) -> None:
        """Pages in the right place prove nothing of a replica that was never made: the buffers must be the placement's."""

        def complain(message: str) -> None:
            hint = "this is an error of the operator or of numagraft: please report it"
            self.incomplete.append(Problem(weight.module, message, hint))

        def name(key: tuple[tuple[int, ...], bool]) -> str:
            nodes = format_list(self._node(index) for index in key[0])
            return f"node {nodes}" if len(key[0]) == 1 else f"nodes {nodes}" + (" interleaved" if key[1] else "")

        held: dict[tuple[tuple[int, ...], bool], int] = {}
        for buffer in weight.buffers:
            key = (tuple(buffer.nodes), buffer.interleaved and len(buffer.nodes) > 1)
            held[key] = held.get(key, 0) + buffer.bytes
        copies: dict[tuple[int, int], dict[tuple[tuple[int, ...], bool], int]] = {}
        for part in weight.placement.parts:
            key = (part.memory_nodes, part.interleaved and len(part.memory_nodes) > 1)
            copies.setdefault((part.begin, part.end), {})[key] = held.get(key, 0)
        asked = {key for group in copies.values() for key in group}
        for key in sorted(asked - set(held)):
            complain(f"{weight.placement.policy} needs a buffer on {name(key)}, but there is none")
        for key in sorted(set(held) - asked):
            complain(f"{format_size(held[key])} lie on {name(key)}, which {weight.placement.policy} did not ask for")
        if weight.planned is not None and not asked ^ set(held):
            self._compare_with_plan(weight, complain)
        for group in copies.values():
            if len(set(group.values()) - {0}) > 1:
                sizes = ", ".join(f"{name(key)}: {format_size(size)}" for key, size in sorted(group.items()))
                complain(f"its copies differ in size ({sizes})")

    def _compare_with_plan(self, weight: PlacedWeight, complain: Callable[[str], None]) -> None:
        """Bytes per node as planned, but for each buffer's last page; a part on several nodes is spread evenly over them."""
        assert weight.planned is not None
        found: dict[int, int] = {}
        slack: dict[int, int] = {}
        for buffer in weight.buffers:
            for node in buffer.nodes:
                found[node] = found.get(node, 0) + -(-buffer.bytes // len(buffer.nodes))
                slack[node] = slack.get(node, 0) + mmap.PAGESIZE
        for node in sorted(found.keys() | weight.planned.keys()):
            planned, held = weight.planned.get(node, 0), found.get(node, 0)
            if not planned - len(weight.buffers) <= held <= planned + slack.get(node, 0):
                complain(f"holds {held:,} bytes on node {self._node(node)}, the plan said {planned:,}")

    def _judge(
        self, buffer: PlacedBuffer, nodes: tuple[int, ...], count: PageCount, sizes: Mapping[int, int]
    ) -> dict[tuple[tuple[int, ...], int | None, bool, int], int]:
        """(asked, found, interleaved, page size) -> pages that should not be there."""
        wrong: dict[tuple[tuple[int, ...], int | None, bool, int], int] = {}
        interleaved = buffer.interleaved and len(nodes) > 1
        for node, pages in count.per_node.items():
            if node not in nodes and pages:
                wrong[nodes, node, interleaved, count.page_bytes] = pages
        if count.absent:
            wrong[nodes, None, interleaved, count.page_bytes] = count.absent
        if interleaved and not wrong:
            total = sum(count.per_node.values())
            # Round-robin goes by the page that is really there: 512 small ones at once where it is a huge one.
            page = max(max(sizes, default=0), count.page_bytes) // count.page_bytes
            slack = max(UNEVEN_SHARE * total, page)
            for node in nodes:
                over = count.per_node.get(node, 0) - total / len(nodes)
                if over > slack:
                    wrong[nodes, node, True, count.page_bytes] = int(over)
        return wrong

    def _arena_of(self, address: int) -> ArenaReport | None:
        index = bisect_right(self._starts, address) - 1
        arena = self._arenas[index] if index >= 0 else None
        return arena if arena is not None and address < arena.address + arena.reserved_bytes else None

    def rows(self) -> tuple[NodeRow, ...]:
        order = {rule: index for index, rule in enumerate(self._policies)}
        keys = sorted(self._accounts, key=lambda key: (order[key[0]], key[1]))
        return tuple(self._row(rule, node, self._accounts[rule, node]) for rule, node in keys)

    def _row(self, rule: str, node: int, account: _Account) -> NodeRow:
        bound = self._layout.bound
        index = self._layout.index_of(node)
        own = None if index is None else self._layout.nodes[index]
        if not bound:
            verdict = "virtual: not bound"
        elif not account.known:
            verdict = "not verified"
        elif account.wrong or own is None or (account.found > 0 and account.asked == 0):
            verdict = "WRONG"
        else:
            verdict = "as asked"
        return NodeRow(
            rule_id=rule,
            node=node,
            policies=tuple(sorted(self._policies[rule])),
            modules=len(account.modules),
            replicas=(min(self._replicas[rule]), max(self._replicas[rule])),
            asked_bytes=account.asked,
            found_bytes=account.found if bound and account.known else None,
            page_bytes=dict(sorted(account.pages.items())),
            cpus=own.cpus[: own.threads] if own is not None and bound else (),
            obtained=tuple(sorted(account.obtained)),
            verdict=verdict,
        )


def _asked_bytes(buffer: PlacedBuffer, nodes: tuple[int, ...], count: PageCount | None) -> dict[int, int]:
    """Node -> bytes. A bind to several nodes leaves it to the kernel how much lies on which: then as found."""
    if len(nodes) > 1 and not buffer.interleaved and count is not None:
        found = {node: pages * count.page_bytes for node, pages in count.per_node.items() if node in nodes}
        if sum(found.values()) >= buffer.bytes:
            return found
    share, rest = divmod(buffer.bytes, len(nodes))
    return {node: share + (rest if i == 0 else 0) for i, node in enumerate(nodes)}


def _add_sizes(pages: dict[int, int], amount: int, sizes: Mapping[int, int]) -> None:
    total = sum(sizes.values())
    for size, part in sizes.items():
        if total and part:
            pages[size] = pages.get(size, 0) + round(amount * part / total)


def _remedy(item: Misplacement) -> str:
    if item.found is None:
        return "they were never touched, or swapped out: turn swap off, or free memory before loading"
    if read_numa_balancing(FolderTree("/")):
        return "the kernel moves pages by itself: sysctl -w kernel.numa_balancing=0, then load again"
    return (
        "another process or a late policy moved them, or the node was full: `numagraft doctor` shows free memory and "
        "what this process may do; then load again"
    )


def _page_shares(page_bytes: Mapping[int, int]) -> str:
    """ "2M", or "2M 97%, 4K 3%"; the largest share first."""
    names = {4096: "4K", 2 << 20: "2M", 1 << 30: "1G"}
    total = sum(page_bytes.values())
    shares = sorted(page_bytes.items(), key=lambda item: -item[1])
    if len(shares) == 1:
        return names.get(shares[0][0], format_size(shares[0][0]))
    return ", ".join(f"{names.get(size, format_size(size))} {amount / total:.0%}" for size, amount in shares) or "-"


def _table(report: PlacementReport) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Where everything was obtained in one way, a line says so: eighty columns are few.
    ways = {row.obtained for row in report.rows}
    table = Table(
        title="Placement", title_justify="left", header_style="bold", box=None, padding=(0, 1), pad_edge=False
    )
    for name in ("rule", "policy", "node", "modules", "asked", "found"):
        table.add_column(name, justify="left" if name in ("rule", "policy") else "right", no_wrap=True)
    for name in ("pages", "cpus", *(("by",) if len(ways) > 1 else ()), "verdict"):
        table.add_column(name)
    for row in report.rows:
        low, high = row.replicas
        copies = "" if high == 1 else f" x{high}" if low == high else f" x{low}-{high}"
        table.add_row(
            row.rule_id,
            "+".join(row.policies) + copies,
            str(row.node),
            str(row.modules),
            format_size(row.asked_bytes),
            "-" if row.found_bytes is None else format_size(row.found_bytes),
            _page_shares(row.page_bytes),
            format_list(row.cpus) or "-",
            *((", ".join(row.obtained) or "-",) if len(ways) > 1 else ()),
            row.verdict,
            style="red" if row.verdict in ("WRONG", "not verified") else "",
        )
    lines = [f"verdict: {report.verdict}"]
    if len(ways) == 1 and (way := next(iter(ways))):
        lines.append(f"placed by {', '.join(way)}")
    if report.page_cache_residue is not None:
        lines.append(f"page cache still holds {format_size(report.page_cache_residue)} of the checkpoint")
    lines += [f"fallback: {text}" for text in report.fallbacks]
    lines += [f"note: {text}" for text in report.notes]
    lines += [f"{item.where}: {item.message}" for item in report.incomplete[:_PROBLEMS_SHOWN]]
    lines += [f"{item.module}: {item.message}" for item in report.misplaced[:_PROBLEMS_SHOWN]]
    lines += [f"{text}: not verified" for text in report.unverified[:_PROBLEMS_SHOWN]]
    return Group(table, *(Text(line) for line in lines))
