"""Grids: what their axes may be, and where each picture stands."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from limner.config import GenerateConfig
from limner.errors import ConfigError
from limner.generation import sheets
from limner.generation.grids import Axis, axes, cells, grids, label
from limner.generation.jobs import Job, Variation

COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta"]


def squares(count: int, size: int = 8) -> list[Image.Image]:
    """Pictures of one colour each."""
    return [Image.new("RGB", (size, size), colour) for colour in COLOURS[:count]]


def corner(sheet: Image.Image, image: Image.Image) -> tuple[int, int]:
    """Left and top of the only place of a picture of one colour."""
    found = np.argwhere((np.asarray(sheet) == image.getpixel((0, 0))).all(axis=2))
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
    assert (right - left + 1, bottom - top + 1) == image.size
    assert len(found) == image.width * image.height
    return int(left), int(top)


def test_axes_are_settings_with_values() -> None:
    assert axes("steps=4,8,20 guidance=1,3") == (Axis("steps", ("4", "8", "20")), Axis("guidance", ("1", "3")))
    assert axes('negative="snow and ice",rain') == (Axis("negative", ("snow and ice", "rain")),)


@pytest.mark.parametrize(
    "text",
    ["", "steps", "steps=", "steps=4,,8", "colour=red", "steps=4 steps=8", "steps=4 seed=1 guidance=2", "'", "=4"],
)
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        axes(text)
    assert "\n" not in str(caught.value)


def test_cells_go_down_the_columns_and_keep_other_settings() -> None:
    config = GenerateConfig(prompts=("A dog.",), seed=5, steps=3, grid="steps=4,8 guidance=1,3")
    found = [(cell.steps, cell.guidance, cell.seed) for cell in cells(config, axes(str(config.grid)))]
    assert found == [(4, 1, 5), (4, 3, 5), (8, 1, 5), (8, 3, 5)]
    with pytest.raises(ConfigError, match="steps"):
        cells(config, axes("steps=4,0"))


def test_two_axes_go_right_and_down() -> None:
    images, job = squares(6), Job("A dog.", "", 7, 4, 1.0, 8, 8)
    [grid] = grids(axes("steps=4,8,20 guidance=1,3"), [[image] for image in images], [job])
    places = np.array([corner(grid, image) for image in images]).reshape(3, 2, 2)  # column, row, (left, top)
    assert (np.diff(places[:, :, 0], axis=0) > 0).all()
    assert (np.diff(places[:, :, 1], axis=1) > 0).all()
    assert (places[:, 0, 1] == places[0, 0, 1]).all()
    assert (places[0, :, 0] == places[0, 0, 0]).all()


def test_one_axis_has_a_row_a_picture_and_two_axes_a_grid_each() -> None:
    images, jobs = squares(4), [Job(prompt, "", 7, 4, 1.0, 8, 8) for prompt in ("A dog.", "A cat.")]
    [grid] = grids(axes("steps=4,8"), [images[:2], images[2:]], jobs)
    places = [corner(grid, image) for image in images]
    assert places[0][0] == places[1][0] < places[2][0] == places[3][0]
    assert places[0][1] == places[2][1] < places[1][1] == places[3][1]
    assert len(grids(axes("steps=4 guidance=1"), [images[:2]], jobs)) == 2


def test_labels_leave_out_what_an_axis_says() -> None:
    job = Job("A dog.", "", 7, 4, 1.0, 8, 8, variation=Variation(9, 0.25))
    assert label(job).replace("\u00a0", " ") == "A dog. (seed 7, variation 9:0.25)"
    assert label(job, {"seed", "variation"}) == "A dog."


def test_a_label_for_several_seeds_says_all_alternatives() -> None:
    job = Job("A dog.", "", 7, 4, 1.0, 8, 8, template="A {dog|cat}.")
    assert (label(job, {"seed"}), label(job, {"steps"})) == ("A {dog|cat}.", "A dog. (seed\u00a07)")


def test_pictures_of_several_sizes_stand_on_one_grid() -> None:
    small, large = squares(1, 8)[0], Image.new("RGB", (30, 50), "blue")
    sheet = sheets.grid({"a": [small, large], "b": [large.copy(), small.copy()]}, ["one", "two"])
    assert sheet.height > 100
    assert (np.asarray(sheet) == (255, 0, 0)).all(axis=2).sum() == 128


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_a_contact_sheet_has_every_picture_under_its_label(count: int) -> None:
    images = squares(count, 64)
    sheet = sheets.contact(images, [f"A dog on a beach number {i}." for i in range(count)])
    places = [corner(sheet, image) for image in images]
    assert places == sorted(places, key=lambda place: (place[1], place[0]))
    array = np.asarray(sheet)
    for left, top in places:
        assert (array[top - 20 : top, left : left + 64] < 160).any(), "no label"
        assert (array[:, left - 1] == 255).all()
