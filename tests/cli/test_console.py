"""Where there is no terminal, tables are wide enough for module names; a terminal or COLUMNS decides otherwise."""

from __future__ import annotations

import pytest

from numagraft.cli.console import UNKNOWN_WIDTH, open_console


def test_a_pipe_gets_more_than_eighty_columns(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert open_console().width == UNKNOWN_WIDTH
    assert open_console(stderr=True).width == UNKNOWN_WIDTH


@pytest.mark.parametrize(("columns", "width"), [("50", 50), ("wide", UNKNOWN_WIDTH)])
def test_columns_that_the_user_asks_for_are_kept(monkeypatch, capsys, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert open_console().width == width
