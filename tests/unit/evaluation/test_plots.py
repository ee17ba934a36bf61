"""Plots and grids, read back from their files."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageColor
from torch import Tensor

from limner.evaluation.mixing import ALPHAS
from limner.evaluation.plots import BLUE, GREEN, VERMILION, grid, plot_alpha, plot_drift
from limner.generation.engine import to_images
from limner.generation.sheets import GAP, GREY

PICTURES = {"cmmd": 0.8, "clip_score": 0.7, "r_precision": 0.4}


def row(alpha: float, **more: float) -> dict[str, Any]:
    """Figures of a mix."""
    figures: dict[str, Any] = {"alpha": alpha, "drift": {"last": 1 - alpha / 5, "penultimate": 1 - alpha / 9}, **more}
    for way, k in itertools.product(("text_to_image", "image_to_text"), (1, 5, 10)):
        value = 0.3 + k / 20 + 0.1 * math.sin(2 * alpha)
        figures[f"{way}_r@{k}"] = {"value": value, "low": value - 0.02, "high": value + 0.02}
    return figures


def read(path: Path) -> np.ndarray:
    """A picture file's bytes (H, W, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def of_colour(picture: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture (H, W, 3) has exactly this colour -> (H, W)."""
    return (picture == ImageColor.getrgb(colour)).all(axis=2)


def upright(picture: np.ndarray) -> list[int]:
    """Where the dashed upright lines begin, from left to right."""
    columns = of_colour(picture, GREY).sum(axis=0) > 100
    return np.flatnonzero(np.diff(columns.astype(int)) == 1).tolist()


@pytest.fixture(scope="module")
def alpha_plots(tmp_path_factory: pytest.TempPathFactory) -> dict[float, np.ndarray]:
    """The same sweep with three different choices."""
    folder = tmp_path_factory.mktemp("plots")
    for chosen in (0.0, 0.5, 1.0):
        plot_alpha([row(alpha) for alpha in ALPHAS], chosen, folder / f"{chosen}.png")
    return {chosen: read(folder / f"{chosen}.png") for chosen in (0.0, 0.5, 1.0)}


def test_the_chosen_alpha_is_marked_in_each_panel(alpha_plots: dict[float, np.ndarray]) -> None:
    first, middle, last = (upright(alpha_plots[chosen]) for chosen in (0.0, 0.5, 1.0))
    assert len(first) == len(middle) == len(last) == 3
    for left, centre, right in zip(first, middle, last):
        assert right - left > 250
        assert centre == pytest.approx((left + right) / 2, abs=2)


def test_a_plot_is_sharp_and_in_the_colours_that_all_can_tell_apart(alpha_plots: dict[float, np.ndarray]) -> None:
    picture = alpha_plots[0.0]
    assert picture.shape == (620, 1600, 3)
    third = picture.shape[1] // 3
    for column, colours in enumerate(((BLUE, VERMILION, GREEN), (BLUE, VERMILION, GREEN), (BLUE, VERMILION))):
        panel = picture[:, third * column : third * (column + 1)]
        assert all(of_colour(panel, colour).sum() > 300 for colour in colours)
    assert not of_colour(picture[:, 2 * third :], GREEN).any()


@pytest.mark.parametrize("end", ["low", "high"])
def test_the_bands_are_the_intervals(alpha_plots: dict[float, np.ndarray], tmp_path: Path, end: str) -> None:
    rows = [row(alpha) for alpha in ALPHAS]
    for figures in rows:
        figures["text_to_image_r@1"][end] = figures["text_to_image_r@1"]["value"]
    plot_alpha(rows, 0, tmp_path / "plot.png")

    def tinted(picture: np.ndarray) -> int:
        values = np.array(ImageColor.getrgb(BLUE)) * 0.15 + 255 * 0.85
        return int((np.abs(picture[:, : picture.shape[1] // 3] - values) < 2).all(axis=2).sum())

    assert tinted(read(tmp_path / "plot.png")) == pytest.approx(tinted(alpha_plots[0.0]) / 2, rel=0.15)


def test_pictures_and_zero_shot_accuracy_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot_alpha([row(alpha, zero_shot_top1=0.5, **PICTURES) for alpha in ALPHAS], 0.3, path)
    picture = read(path)
    assert picture.shape == (1160, 1600, 3)
    assert len(upright(picture[:560])) == len(upright(picture[600:])) == 3
    assert of_colour(picture[:560, 1080:], GREEN).sum() > 300  # the accuracy
    for column in range(3):
        assert of_colour(picture[600:, 533 * column : 533 * (column + 1)], BLUE).sum() > 300


def test_figures_that_are_missing_leave_gaps(tmp_path: Path) -> None:
    rows = [row(alpha) for alpha in ALPHAS]
    for name, value in (("gap", None), ("zero", 0.0)):
        rows[4]["drift"]["last"] = value
        plot_alpha(rows, 0, tmp_path / f"{name}.png")
    assert not np.array_equal(read(tmp_path / "gap.png"), read(tmp_path / "zero.png"))
    cka = [None, 0.9, None, 0.7]
    drift = {layer: {"cosine": [1.0, 0.9, 0.8, None], "cka": cka} for layer in ("last", "penultimate")}
    plot_drift(drift, tmp_path / "drift.png")


def test_drift_is_shown_by_layer(tmp_path: Path) -> None:
    def drift(last: float, penultimate: float) -> dict[str, Any]:
        ends = {"last": last, "penultimate": penultimate}
        return {k: {"cosine": np.linspace(1, v, 77).tolist(), "cka": [None] + [v] * 76} for k, v in ends.items()}

    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, ends in zip(paths, ((0.5, 0.6), (0.5, 0.5), (0.6, 0.5))):
        plot_drift(drift(*ends), path)
    first, second, third = map(read, paths)
    half = first.shape[1] // 2
    assert first.shape[1] == 1600
    for colour in (BLUE, VERMILION):
        for part in (slice(half), slice(half, None)):
            assert of_colour(first[:, part], colour).sum() > 300
    assert np.array_equal(first[:, :half], second[:, :half])
    assert not np.array_equal(first[:, half:], second[:, half:])
    assert not np.array_equal(second[:, :half], third[:, :half])


# ---- grids


def random_pixels(count: int, height: int, width: int, seed: int) -> Tensor:
    """Noise (count, 3, height, width) in [-1, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def places(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Every top and left at which a sheet has this picture, to the byte."""
    corner = np.argwhere((sheet == picture[0, 0]).all(axis=2))
    windows = sliding_window_view(sheet, picture.shape)[:, :, 0]
    high, wide = windows.shape[:2]
    return [(y, x) for y, x in corner.tolist() if y < high and x < wide and (windows[y, x] == picture).all()]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (64, 300)])
def test_each_picture_stands_once_in_its_column_and_row(tmp_path: Path, height: int, width: int) -> None:
    columns = {f"alpha {a}": random_pixels(3, height, width, seed=a) for a in range(4)}
    captions = ["A dog.", "A very long caption that goes on " * 20, "Two\nlines."]
    grid(columns, captions, tmp_path / "grid.png")
    sheet = read(tmp_path / "grid.png")
    found = {label: [places(sheet, np.asarray(p)) for p in to_images(pixels)] for label, pixels in columns.items()}
    assert all(len(place) == 1 for column in found.values() for place in column)
    tops = [[place[0][0] for place in column] for column in found.values()]
    lefts = [{place[0][1] for place in column} for column in found.values()]
    assert all(column == tops[0] for column in tops)
    assert all(len(column) == 1 for column in lefts)
    order = [next(iter(column)) for column in lefts]
    assert order == sorted(order)
    assert order[0] == GAP
    assert tops[0] == sorted(tops[0])
    above = [0, *(top + height for top in tops[0])]
    for begin, end in zip(above, tops[0]):  # each caption stands above its pictures
        assert (sheet[begin:end] < 128).all(axis=2).any()
        assert (sheet[begin : begin + GAP] == 255).all()
    assert (sheet[above[-1] :] == 255).all()
    assert (sheet[above[1] : tops[0][1], -GAP:] == 255).all()  # the long one ends before the edge


def test_no_two_labels_overlap_over_small_pictures(tmp_path: Path) -> None:
    names, pixels = ["the base, as it was", "tuned", "x"], random_pixels(1, 8, 8, seed=0)
    grid(dict.fromkeys(names, pixels), ["A dog."], tmp_path / "grid.png")
    sheet = read(tmp_path / "grid.png")
    found = places(sheet, np.asarray(to_images(pixels)[0]))
    assert len(found) == 3
    for top, left in found[1:]:
        assert (sheet[:top, left - GAP + 1 : left - 1] == 255).all()
        assert (sheet[:top, left : left + 8] < 200).any()


def test_letters_of_other_languages_can_be_told_apart(tmp_path: Path) -> None:
    texts = ["α 0", "β 0", "Ein Hund läuft.", "Ein Hund löuft.", "Ein Hund lюuft."]
    for number, text in enumerate(texts):
        grid({text: random_pixels(1, 8, 8, seed=0)}, [text], tmp_path / f"{number}.png")
    sheets = {(tmp_path / f"{number}.png").read_bytes() for number in range(len(texts))}
    assert len(sheets) == len(texts)


def test_a_grid_is_written_where_matplotlib_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra, and `assemble` makes grids without it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pixels = random_pixels(1, 8, 8, seed=0)
    grid({"tuned": pixels}, ["A dog."], tmp_path / "grid.png")
    [(top, _)] = places(read(tmp_path / "grid.png"), np.asarray(to_images(pixels)[0]))
    assert (read(tmp_path / "grid.png")[:top] < 128).any()


def test_a_caption_too_few_writes_nothing_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    grid({"a": random_pixels(2, 8, 8, seed=0)}, ["A dog.", "A cat."], path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        grid({"a": random_pixels(2, 8, 8, seed=1)}, ["A dog."], path)
    with pytest.raises(ValueError):
        grid({"a": random_pixels(2, 8, 8, seed=1), "b": random_pixels(1, 8, 8, seed=1)}, ["A dog.", "A cat."], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_what_cant_be_written_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        plot_alpha([row(0), row(1)], 0, tmp_path / "file" / "plot.png")
    with pytest.raises(OSError):
        grid({"a": random_pixels(1, 8, 8, seed=0)}, ["A dog."], tmp_path / "file" / "grid.png")
