"""The page of an evaluation says what was found, and shows captions and names as text, whatever they hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from limner.data.dataset import Record
from limner.evaluation import report
from limner.evaluation.assessment import Pair, Result
from limner.evaluation.contenders import Contender
from limner.evaluation.scores import Seen
from photos import jpeg, put

HOSTILE = '<script>alert("x")</script> & {{ 7 * 7 }}'


def figure(value: float, low: float, high: float, **more: float) -> dict[str, float]:
    """A figure as metrics.json has it."""
    return {"value": value, "low": low, "high": high, "count": 9, **more}


def row(label: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A contender as metrics.json has it."""
    facts = {"folder": "f", "settings": {}, "pictures": 9, "skipped": [], "remarks": [], "judge_is_condition": False}
    return {"label": label, **facts, "figures": figures}


@pytest.fixture
def metrics() -> dict[str, Any]:
    """Two folders of pictures."""
    network = {"name": "eye", "sha256": "1" * 64, "size": 16, "filter": "lanczos"}
    hardware = {"machine": "m", "cores": 2, "gpu": None, "torch": "2", "threads": 1}
    differences = {
        "r_precision": figure(0.2, 0.1, 0.3, p=0.001),
        "frechet": figure(0.5, 0.2, 0.8, p=0.01),
        "clip_score": figure(-0.1, -0.3, 0.1, p=0.4),
        "cmmd": figure(-2.0, -3.0, -1.0, p=0.2),
    }
    return {
        "limner": "0.1.0",
        "finished": "2026-01-01T00:00:00",
        "command": "limner evaluate",
        "data": {"name": HOSTILE, "split": "test", "sha256": "2" * 64, "captions": 9, "candidates": 100},
        "seeds": [0, 8],
        "judge": {"name": "judge", "sha256": "3" * 64, "network": network},
        "extractors": [],
        "left_out": [],
        "hardware": hardware,
        "photographs": row("photographs", {"alignment": {"r_precision": figure(0.5, 0.4, 0.6)}}),
        "contenders": [
            row("one", {"alignment": {"r_precision": figure(0.25, 0.1, 0.4)}}),
            row(HOSTILE, {"alignment": {"r_precision": figure(0.45, 0.3, 0.6)}}),
        ],
        "comparisons": [{"one": HOSTILE, "other": "one", "figures": differences}],
    }


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    """What was found of the first of them, whose picture number n scores n."""
    records = []
    for number in range(9):
        put(tmp_path, {f"{number}.jpg": jpeg(number)})
        records.append(Record(tmp_path / f"{number}.jpg", (f"{HOSTILE} {number}.",)))
    scores = {"clip_score": torch.arange(9.0)}
    seen = Seen(torch.zeros(9, 2), torch.zeros(9, 2), scores, [])
    pairs = {"copies_by_pixels": [Pair(records[0].path, records[1].path, 0.25, is_copy=True)]}
    return [Result(Contender("one", records, {}), seen=seen, pairs=pairs)]


def page(out: Path, metrics: dict[str, Any], results: list[Result]) -> tuple[str, str]:
    """-> the HTML of the report, and its words."""
    report.write(out, metrics, results, [])
    html = (out / "report.html").read_text()
    body = html[html.index("<body>") :]
    return html, " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_markup_in_captions_and_names_is_text(tmp_path: Path, metrics: dict[str, Any], results: list[Result]) -> None:
    html, _ = page(tmp_path, metrics, results)
    assert "<script" not in html
    assert "{{ 7 * 7 }}" in html


def test_values_stand_beside_their_intervals(tmp_path: Path, metrics: dict[str, Any], results: list[Result]) -> None:
    _, text = page(tmp_path, metrics, results)
    assert "photographs 50.0 % 40.0 to 60.0 one 25.0 % 10.0 to 40.0" in text


def test_a_difference_is_told_only_where_interval_and_test_agree(
    tmp_path: Path, metrics: dict[str, Any], results: list[Result]
) -> None:
    _, text = page(tmp_path, metrics, results)
    assert "R-precision +20.0 % 10.0 to 30.0 &lt; 0.01 9 better" in text
    assert "Fréchet distance +0.5 0.2 to 0.8 0.01 9 worse" in text
    assert "CLIPScore −0.1 −0.3 to 0.1 0.40 9 not told apart" in text
    assert "CMMD −2 −3 to −1 0.20 9 not told apart" in text


def test_the_best_the_median_and_the_worst_are_shown(
    tmp_path: Path, metrics: dict[str, Any], results: list[Result]
) -> None:
    _, text = page(tmp_path, metrics, results)
    found = re.findall(r"score (\d)\.00", text)
    assert found == ["8", "7", "6", "5", "4", "3", "2", "1", "0"]


def test_fewer_rivals_than_99_are_told(tmp_path: Path, metrics: dict[str, Any], results: list[Result]) -> None:
    assert "by chance it is" not in page(tmp_path, metrics, results)[1]
    metrics["data"]["candidates"] = 64
    assert (
        "has 64 different captions, so R-precision is among these; by chance it is 1.6 %"
        in (page(tmp_path, metrics, results)[1])
    )


def test_distances_of_photographs_are_those_of_training_and_of_no_other_of_that_name(
    tmp_path: Path, metrics: dict[str, Any], results: list[Result]
) -> None:
    distance = {"fidelity": {"cmmd": figure(2, 1, 3)}}
    metrics["photographs"] = row("photographs", distance)
    metrics["contenders"] = [row("photographs", distance)]
    _, text = page(tmp_path, metrics, results)
    assert "training photographs 2 1 to 3 photographs 2 1 to 3" in text


def test_copies_are_named_as_such(tmp_path: Path, metrics: dict[str, Any], results: list[Result]) -> None:
    metrics["contenders"][0]["figures"]["copies"] = {"copies_by_pixels": figure(0.1, 0, 0.2)}
    _, text = page(tmp_path, metrics, results)
    assert "one: nearest by pixels copy, distance 0.25" in text
