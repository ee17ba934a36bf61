"""What drawing cost is counted over all calls, and only with what was drawn alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limner.evaluation import drawing
from limner.evaluation.parts import cost_figures
from limner.generation import provenance
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


def test_seconds_are_those_of_every_picture_once_but_for_the_first_of_a_call(model: Model, tmp_path: Path) -> None:
    for count in (2, 5, 5):
        draw(model, tmp_path, count)
    cost = drawing.cost(tmp_path)
    assert cost is not None
    assert len(cost["seconds"]) == 3
    assert min(cost["seconds"]) > 0
    figures = cost_figures(cost)
    assert figures["seconds"].count == 3
    assert 50 < figures["memory"].value < 100_000, "MiB of a process with torch"


def test_other_steps_are_counted_anew(model: Model, tmp_path: Path) -> None:
    draw(model, tmp_path, 2)
    draw(model, tmp_path, 3, steps=2)
    cost = drawing.cost(tmp_path)
    assert cost is not None
    assert cost["where"]["steps"] == 2
    assert len(cost["seconds"]) == 2


def test_away_from_the_cpu_a_batch_is_timed_as_a_whole(model: Model, tmp_path: Path) -> None:
    elsewhere = copy.copy(model)
    elsewhere.painter = copy.copy(model.painter)
    elsewhere.device = elsewhere.painter.device = torch.device("meta")  # the networks stay where they are
    draw(elsewhere, tmp_path, 5)
    cost = drawing.cost(tmp_path)
    assert cost is not None
    assert len(cost["seconds"]) == 2, "of batches of 2, 2 and 1, the first warms up"
    assert min(cost["seconds"]) > max(cost["seconds"]) / 20


def test_what_another_device_drew_is_drawn_again(model: Model, tmp_path: Path) -> None:
    elsewhere = copy.copy(model)
    elsewhere.device_facts = {**model.device_facts, "type": "cuda"}
    draw(elsewhere, tmp_path, 2)
    draw(model, tmp_path, 2)
    assert {provenance.read(file)["device"]["type"] for file in tmp_path.glob("*.png")} == {"cpu"}


def test_nothing_drawn_has_no_cost(tmp_path: Path) -> None:
    assert cost_figures(drawing.cost(tmp_path)) == {}
