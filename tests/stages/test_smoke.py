"""recipes/smoke, as a shell runs it: every command once, from drawn shapes to a picture, and then again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from limner.artifacts import is_finished, read_json, sha256_folder
from limner.generation import provenance
from limner.models import vae as vaes
from trainings import run_recipe

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

RUNS = ("clip", "vae", "latents", "unet")
NAMES = ["a-red-circle-on-a-blue-ground-7.png", "a-red-circle-on-a-blue-ground-8.png"]


def smoke(out: Path) -> str:
    """Run the recipe. -> what it printed."""
    return run_recipe("smoke", str(out), cwd=out.parent, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe leaves."""
    folder = tmp_path_factory.mktemp("smoke") / "out"
    smoke(folder)
    return folder


def test_every_run_is_finished(out: Path) -> None:
    assert {p.name for p in out.iterdir()} == {"shapes", "data", *RUNS, "model", "pictures"}
    assert all(is_finished(out / name) for name in RUNS)
    assert not list(out.rglob("*.partial"))


def test_each_stage_was_made_from_the_one_before(out: Path) -> None:
    parents = {name: read_json(out / name / "manifest.json")["parents"] for name in (*RUNS, "model")}
    assert set(parents["latents"]) == {"data/train", "data/val", "vae", "clip"}
    assert parents["latents"]["clip"] == parents["model"]["clip"]
    assert parents["latents"]["vae"] == vaes.encoder_identity(str(out / "vae"))
    assert parents["clip"]["data"] == parents["vae"]["data"] == parents["latents"]["data/train"]


def test_the_pictures_know_their_origin(out: Path) -> None:
    assert sorted(p.name for p in (out / "pictures").iterdir()) == NAMES
    for name, seed in zip(NAMES, (7, 8)):
        file = out / "pictures" / name
        assert Image.open(file).size == (32, 32)
        record = provenance.read(file)
        assert record["prompt"] == "A red circle on a blue ground."
        assert record["seed"] == seed
        assert record["steps"] == 4


def test_a_second_run_finds_its_work_done_and_draws_the_same(out: Path) -> None:
    before = sha256_folder(out)
    said = smoke(out)
    assert said.count("Nothing to do") >= len((*RUNS, "model"))
    again = {name.replace(".png", "-2.png"): before[f"pictures/{name}"] for name in NAMES}
    assert sha256_folder(out) == before | {f"pictures/{name}": digest for name, digest in again.items()}
