"""recipes/builtin at a thousandth of its length, on the real Flickr8k: some minutes, so only where it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import limner
from limner.artifacts import sha256_folder
from limner.models.loading import BUILTIN
from trainings import run_recipe

DATA = Path(__file__).parents[3] / "shared" / "data"
ASKED = "LIMNER_RECIPE"

pytestmark = [
    pytest.mark.skipif(ASKED not in os.environ, reason=f"takes minutes; set {ASKED}=1 to run it"),
    pytest.mark.skipif(not (DATA / "flickr8k").is_dir(), reason=f"needs Flickr8k and the extra data in {DATA}"),
]


def test_a_rehearsal_makes_a_model_with_its_card_and_ships_nothing_and_the_plan_follows_from_it(tmp_path: Path) -> None:
    shipped = sha256_folder(BUILTIN)
    plan = run_recipe("builtin", "--dry-run", str(DATA / "flickr8k"), str(DATA / "extra"), cwd=tmp_path)
    made = tmp_path / "runs" / "builtin" / "rehearsal" / "model"
    assert limner.load(str(made))("A dog on a beach.", steps=1).images[0].width >= 128
    card = (made / "MODEL_CARD.md").read_text(encoding="utf-8")
    for heading in ("## Data and licence", "## Trainings", "## Figures", "## Pictures", "## Memorisation"):
        assert heading in card
    assert sha256_folder(BUILTIN) == shipped
    recipes = ("teachers.py", "base_clip.py", "pseudo_captions.py")
    for part in (*recipes, "train clip", "train vae", "train unet", "encode", "assemble"):
        assert f"{part} " in plan
    assert "\nIn all " in plan
