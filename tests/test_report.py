from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from numagraft.errors import PlacementError
from numagraft.placement import Placement, PlacementSpec, resolve
from numagraft.report import PlacedWeight, build_report
from numagraft.runtime import RuntimeLayout, RuntimeNode

PAGE = 4096
MIB = 1 << 20


@dataclass(frozen=True)
class Buffer:
    address: int
    bytes: int
    nodes: tuple[int, ...]
    interleaved: bool = False
    owner: str = "m"


@dataclass(frozen=True)
class Count:
    per_node: dict[int, int]
    absent: int = 0
    method: str = "move_pages"
    page_bytes: int = PAGE
    exact: bool = True


@dataclass(frozen=True)
class Arena:
    address: int = 0
    reserved_bytes: int = 1 << 40
    obtained: str = "mbind"
    refused: str = ""
    page_bytes: dict[int, int] = field(default_factory=lambda: {PAGE: 1 << 40})


@dataclass(frozen=True)
class Units:
    count: int = 64
    multiple: int = 16
    packed_bytes: int = 2 * MIB


@dataclass
class Machine:
    """Two nodes whose kernel ids are 0 and 2, and a kernel that answers what a test planted."""

    bound: bool = True
    arenas: tuple[Arena, ...] = (Arena(),)
    planted: dict[int, Count] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    @property
    def layout(self) -> RuntimeLayout:
        return RuntimeLayout(
            (RuntimeNode(0, (0, 1, 8, 9), 2, 0, 1 << 36, 1 << 36), RuntimeNode(2, (2, 3), 2, 1, 1 << 36, 1 << 36)),
            bound=self.bound,
        )

    def memory_report(self) -> tuple[Arena, ...]:
        return self.arenas

    def survey(self, buffers) -> tuple[list[Count], tuple[Arena, ...]]:
        self.asked += [buffer.address for buffer in buffers]
        return [self.planted[buffer.address] for buffer in buffers], self.arenas

    def report(self, *weights: PlacedWeight, **options):
        return build_report(weights, self, **options)


def place(policy: str) -> Placement:
    return resolve(PlacementSpec(policy), Units(), Machine().layout)


def weight(policy: str, *buffers: Buffer, rule: str = "experts", module: str = "layers.0.mlp.experts") -> PlacedWeight:
    return PlacedWeight(rule, module, place(policy), buffers)


MIRROR = weight("mirror", Buffer(0, 2 * MIB, (0,)), Buffer(2 * MIB, 2 * MIB, (1,)))
GOOD = {0: Count({0: 512}), 2 * MIB: Count({2: 512})}


def test_pages_where_they_were_asked_to_be():
    report = Machine(planted=GOOD).report(MIRROR, page_cache_residue=0, fallbacks=["lm_head: kept"])
    assert report.ok
    assert report.require() is report
    assert [(row.node, row.asked_bytes, row.found_bytes, row.cpus, row.verdict) for row in report.rows] == [
        (0, 2 * MIB, 2 * MIB, (0, 1), "as asked"),
        (2, 2 * MIB, 2 * MIB, (2, 3), "as asked"),
    ]
    assert report.rows[0].replicas == (2, 2)
    assert report.rows[0].obtained == ("mbind",)
    assert report.rows[0].page_bytes == {PAGE: 2 * MIB}
    assert report.verdict == "as asked: 4.00 MiB verified by move_pages"
    assert "page cache still holds 0 B" in str(report)
    assert "fallback: lm_head: kept" in str(report)


def test_every_buffer_is_asked_for():
    machine = Machine(planted=GOOD)
    machine.report(MIRROR)
    assert machine.asked == [0, 2 * MIB]


def test_one_page_on_the_wrong_node_is_seen():
    report = Machine(planted={**GOOD, 2 * MIB: Count({2: 511, 0: 1})}).report(MIRROR)
    assert not report.ok
    assert [row.verdict for row in report.rows] == ["as asked", "WRONG"]
    with pytest.raises(PlacementError) as caught:
        report.require()
    (problem,) = caught.value.problems
    assert problem.where == "layers.0.mlp.experts"
    assert problem.message == "1 pages (4.00 KiB) asked for node 2 are on node 0"
    assert problem.hint
    assert "WRONG: 1 module with pages elsewhere" in str(report)


def test_a_replica_on_a_node_outside_the_runtime():
    report = Machine(planted={**GOOD, 0: Count({5: 512})}).report(MIRROR)
    assert [(row.node, row.asked_bytes, row.found_bytes, row.verdict) for row in report.rows] == [
        (0, 2 * MIB, 0, "WRONG"),
        (2, 2 * MIB, 2 * MIB, "as asked"),
        (5, 0, 2 * MIB, "WRONG"),
    ]


def test_absent_pages_are_seen():
    report = Machine(planted={**GOOD, 0: Count({0: 500}, absent=12)}).report(MIRROR)
    with pytest.raises(PlacementError, match=r"12 pages .* asked for node 0 are not in memory"):
        report.require()


@pytest.mark.parametrize(
    "count",
    [Count({}, method="unverifiable"), Count({0: 512}, method="numa_maps", exact=False), Count({0: 100})],
    ids=["refused", "inexact", "fewer pages than asked"],
)
def test_what_the_kernel_does_not_tell_is_no_proof(count):
    report = Machine(planted={**GOOD, 0: count}).report(MIRROR)
    assert not report.ok
    assert report.rows[0].verdict == "not verified"
    assert report.rows[0].found_bytes is None
    with pytest.raises(PlacementError, match="does not tell where its pages are"):
        report.require()


def test_numa_maps_is_as_good_when_it_is_exact():
    count = Count({0: 512}, method="numa_maps")
    report = Machine(planted={**GOOD, 0: count}).report(MIRROR)
    assert report.ok
    assert report.methods == ("move_pages", "numa_maps")


@pytest.mark.parametrize(
    ("found", "sizes", "ok"),
    [
        ({0: 2560, 2: 2560}, {PAGE: 1}, True),
        ({0: 2600, 2: 2520}, {PAGE: 1}, True),  # 40 of 5120 pages: 0.8 %
        ({0: 2640, 2: 2480}, {PAGE: 1}, False),  # 1.6 %
        ({0: 3072, 2: 2048}, {2 * MIB: 1}, True),  # one huge page more than half
        ({0: 3584, 2: 1536}, {2 * MIB: 1}, False),  # two
        ({0: 5120}, {PAGE: 1}, False),
    ],
)
def test_interleaving_is_even_to_one_percent_or_one_page(found, sizes, ok):
    interleaved = weight("interleave", Buffer(0, 20 * MIB, (0, 1), True))
    report = Machine(planted={0: Count(found)}, arenas=(Arena(page_bytes=sizes),)).report(interleaved)
    assert report.ok is ok
    if not ok:
        assert "asked to be even over nodes 0,2, but" in report.misplaced[0].message


def test_a_single_odd_page_is_even():
    odd = weight("interleave", Buffer(0, 3 * PAGE, (0, 1), True))
    assert Machine(planted={0: Count({0: 2, 2: 1})}).report(odd).ok


def test_bind_to_several_nodes_may_fill_one_first():
    bound = PlacedWeight(
        "experts",
        "m",
        resolve(PlacementSpec("bind", nodes=(0, 2)), Units(), Machine().layout),
        (Buffer(0, 2 * MIB, (0, 1)),),
    )
    report = Machine(planted={0: Count({0: 500, 2: 12})}).report(bound)
    assert report.ok
    assert [(row.node, row.asked_bytes) for row in report.rows] == [(0, 500 * PAGE), (2, 12 * PAGE)]


def test_a_virtual_layout_is_not_bound_and_says_so():
    machine = Machine(bound=False)
    report = machine.report(MIRROR)
    assert report.ok and report.virtual
    assert report.verdict == "virtual: not bound"
    assert {row.verdict for row in report.rows} == {"virtual: not bound"}
    assert [row.found_bytes for row in report.rows] == [None, None]
    assert machine.asked == []


def test_refused_mbind_is_listed_and_no_error():
    refused = Arena(obtained="first_touch", refused="EPERM")
    report = Machine(planted=GOOD, arenas=(refused,)).report(MIRROR)
    assert report.ok
    assert report.fallbacks == ("mbind is refused (EPERM): first_touch",)
    assert report.rows[0].obtained == ("first_touch",)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ((Buffer(0, 2 * MIB, (0,)),), "mirror needs a buffer on node 2, but there is none"),
        (
            (*MIRROR.buffers, Buffer(4 * MIB, MIB, (0, 1), True)),
            "1.00 MiB lie on nodes 0,2 interleaved, which mirror did not",
        ),
        (
            (Buffer(0, 2 * MIB, (0,)), Buffer(2 * MIB, MIB, (1,))),
            "its copies differ in size (node 0: 2.00 MiB, node 2: 1.00 MiB)",
        ),
    ],
    ids=["a replica is missing", "a buffer too many", "half a replica"],
)
def test_buffers_that_are_not_the_placements(bound, buffers, message):
    planted = {0: Count({0: 512}), 2 * MIB: Count({2: 512 * buffers[1].bytes // (2 * MIB)} if len(buffers) > 1 else {})}
    planted[4 * MIB] = Count({0: 128, 2: 128})
    report = Machine(planted=planted, bound=bound).report(weight("mirror", *buffers))
    assert not report.ok
    with pytest.raises(PlacementError) as caught:
        report.require()
    assert message in caught.value.problems[0].message


def test_rules_and_modules_are_counted():
    planted = {i * MIB: Count({0: 256}) for i in range(4)}
    weights = [weight("bind", Buffer(i * MIB, MIB, (0,)), rule="a" if i < 3 else "b", module=f"m{i}") for i in range(4)]
    rows = Machine(planted=planted).report(*weights).rows
    assert [(row.rule_id, row.modules, row.asked_bytes) for row in rows] == [("a", 3, 3 * MIB), ("b", 1, MIB)]


def test_page_sizes_are_those_of_the_arena():
    arenas = (
        Arena(0, 2 * MIB, page_bytes={PAGE: 1 << 20, 2 * MIB: 3 << 20}),
        Arena(2 * MIB, 2 * MIB, page_bytes={PAGE: 5}),
    )
    report = Machine(planted=GOOD, arenas=arenas).report(MIRROR)
    assert [row.page_bytes for row in report.rows] == [{PAGE: MIB // 2, 2 * MIB: 3 * MIB // 2}, {PAGE: 2 * MIB}]


def test_the_table_fits_a_terminal():
    mixed = Arena(page_bytes={PAGE: 1 << 20, 2 * MIB: 3 << 20})
    text = str(Machine(planted=GOOD, arenas=(mixed,)).report(MIRROR))
    assert "2M 75%, 4K 25%" in text
    assert "placed by mbind" in text
    assert "mirror x2" in text
    assert max(map(len, text.splitlines())) <= 100
    plain = str(Machine(planted=GOOD).report(MIRROR))
    assert max(map(len, plain.splitlines())) <= 80
    two_ways = (Arena(0, 2 * MIB), Arena(2 * MIB, 2 * MIB, obtained="first_touch"))
    assert "first_touch" in str(Machine(planted=GOOD, arenas=two_ways).report(MIRROR)).splitlines()[3]


def test_json_is_plain():
    data = json.loads(json.dumps(Machine(planted=GOOD).report(MIRROR).to_json()))
    assert data["ok"] is True
    assert data["rows"][0]["found_bytes"] == 2 * MIB
    assert data["misplaced"] == []


def test_a_thousand_wrong_modules_make_a_readable_error():
    planted = {i * MIB: Count({2: 256}) for i in range(1000)}
    weights = [weight("bind", Buffer(i * MIB, MIB, (0,)), module=f"m{i}") for i in range(1000)]
    with pytest.raises(PlacementError) as caught:
        Machine(planted=planted).report(*weights).require()
    assert len(caught.value.problems) == 41
    assert "and 960 more" in str(caught.value)


def test_nothing_placed():
    report = Machine(arenas=()).report()
    assert report.ok
    assert report.verdict == "nothing was placed"
