from __future__ import annotations

import fake_native
import pytest

from numagraft import native


@pytest.fixture(autouse=True)
def native_weights(monkeypatch):
    """Where the façade has no weights yet, the stand-in."""
    for name in (
        *("Matrix", "WeightFormat", "Gate", "PlacedBuffer", "OperatorStats", "Runtime", "LinearWeights", "ExpertsWeights"),
        *("linear_packed_bytes", "experts_packed_bytes"),
    ):
        if not hasattr(native, name):
            monkeypatch.setattr(native, name, getattr(fake_native, name), raising=False)
