"""Every bad rule file is refused with exactly these words."""

from __future__ import annotations

import pytest

from .bad_files import cases, said


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_it_is_refused_with_these_words(case, tmp_path):
    assert said(case.text, tmp_path) == case.expected
    assert case.expected, "a bad file was accepted"


def test_there_are_enough_of_them():
    assert len(cases()) >= 40
    assert len({case.name for case in cases()}) == len(cases())


def test_a_good_file_is_accepted(tmp_path):
    text = "schema: 1\nrules:\n  - id: a\n    match: {role: linear}\n    replace: {class: linear}\n"
    assert said(text, tmp_path) == ""
