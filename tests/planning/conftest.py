from __future__ import annotations

import pytest

from numagraft import registry


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """`linear` and `experts` plan without the native backend."""
    monkeypatch.setitem(registry.OPERATORS, "linear", "tests.planning.packing_stand_ins:LinearStandIn")
    monkeypatch.setitem(registry.OPERATORS, "experts", "tests.planning.packing_stand_ins:ExpertsStandIn")
    registry.operator_table.cache_clear()
    yield
    registry.operator_table.cache_clear()
