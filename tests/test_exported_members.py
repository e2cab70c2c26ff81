"""The root package is a table of contents: what it names exists, is sorted, and comes without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import numagraft


def test_all_is_sorted_and_agrees_with_the_table():
    assert numagraft.__all__ == sorted(numagraft.__all__)
    assert set(numagraft.__all__) == set(numagraft._HOME)


@pytest.mark.parametrize("name", numagraft.__all__)
def test_every_exported_name_exists(name):
    value = getattr(numagraft, name)
    assert value.__module__.startswith("numagraft.")
    assert value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        numagraft.no_such_name  # noqa: B018


def test_import_loads_neither_torch_nor_native():
    code = (
        "import numagraft, sys; print([m for m in ('torch', 'transformers', 'numagraft._native') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == "[]"
