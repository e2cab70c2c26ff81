"""Where memory really lies, asked of the kernel. Node numbers are the kernel's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from numagraft import _native


@dataclass(frozen=True)
class PageCount:
    """Pages of `page_bytes` by node, and those that are not there (never touched, swapped out).

    `method`: "move_pages" asked for every page. "numa_maps": move_pages is refused, and /proc/self/numa_maps counts whole
    mappings; `exact` says whether that settles the range (one node holds all of it, or the mappings lie inside the range).
    "unverifiable": the kernel tells nothing.
    """

    per_node: Mapping[int, int]
    absent: int
    method: Literal["move_pages", "numa_maps", "unverifiable"]
    exact: bool
    page_bytes: int


def page_count(found: _native.PageCount) -> PageCount:
    """The binding's count as data."""
    return PageCount(found.per_node, found.absent, found.method, found.exact, found.page_bytes)


def query_pages(address: int, bytes: int) -> PageCount:
    """Counts the pages of [address, address + bytes) by kernel node; for many ranges at once see `Runtime.verify`."""
    return page_count(_native.query_pages(address, bytes))


def query_page_sizes(address: int, bytes: int) -> dict[int, int]:
    """Resident bytes by page size (4096, 2 MiB, 1 GiB) from smaps; exact for whole mappings, in proportion for parts."""
    return _native.query_page_sizes([(address, bytes)])[0]


def query_page_sizes_of(ranges: Sequence[tuple[int, int]]) -> list[dict[int, int]]:
    """The same for many (address, bytes) with one reading of smaps."""
    return _native.query_page_sizes(list(ranges))
