"""A line of JSON Lines is one line, for every reader, and comes back."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from limner.data.findings import Finding, Rejected, json_line


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\x85\u2028\u2029\x1c")))
def test_a_line_is_one_line_and_comes_back(text: str) -> None:
    line = json_line({"file": text})
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"file": text}


def test_a_name_that_is_no_unicode_can_be_written() -> None:
    assert json_line("caf\udce9") == '"caf?"\n'


def test_a_finding_is_written_without_what_it_does_not_say() -> None:
    assert Finding("a.jpg", "too small").row() == {"file": "a.jpg", "reason": "too small", "kept": False}
    assert Finding("a", "b", "1x1", kept=True).row() == {"file": "a", "reason": "b", "detail": "1x1", "kept": True}


def test_a_rejection_has_a_short_detail_of_one_line() -> None:
    error = Rejected("broken picture", "a\nb  c" + "x" * 1_000)
    assert error.detail.startswith("a b cx")
    assert len(error.detail) == 200
