"""What drawing cost is counted over all calls, and only with what was drawn alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from limner.evaluation import drawing
from limner.evaluation.parts import cost_figures
from limner.generation.jobs import make_jobs
from limner.generation.model import Model
from tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that draws 16x16 pixels."""
    return Model.load(str(tiny_model(tmp_path_factory.mktemp("models") / "tiny")), "cpu")


def draw(model: Model, folder: Path, count: int, steps: int = 1) -> None:
    """Draw that many pictures, or those of them that are not there."""
    (job,) = make_jobs(model.spec, ["A dog."], steps=steps)
    jobs = {folder / f"{seed}.png": replace(job, seed=seed) for seed in range(count)}
    drawing.draw(model, jobs, folder, batch_size=2)


def test_seconds_are_those_of_every_picture_once(model: Model, tmp_path: Path) -> None:
    for count in (2, 3, 3):
        draw(model, tmp_path, count)
    cost = drawing.cost(tmp_path)
    assert cost is not None
    assert len(cost["seconds"]) == 3
    assert min(cost["seconds"]) > 0
    figures = cost_figures(cost)
    assert figures["seconds"].count == 2, "the first picture warms up"
    assert 50 < figures["memory"].value < 100_000, "MiB of a process with torch"


def test_other_steps_are_counted_anew(model: Model, tmp_path: Path) -> None:
    draw(model, tmp_path, 2)
    draw(model, tmp_path, 3, steps=2)
    cost = drawing.cost(tmp_path)
    assert cost is not None
    assert cost["where"]["steps"] == 2
    assert len(cost["seconds"]) == 3


def test_nothing_drawn_has_no_cost(tmp_path: Path) -> None:
    assert cost_figures(drawing.cost(tmp_path)) == {}
