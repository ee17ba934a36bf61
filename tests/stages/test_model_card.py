"""recipes/card.py: a model's card gets its figures, its pictures and what they come near to, from one command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from limner.models.clip import HALF, Clip
from stages.conftest import prepared
from tiny import tiny_clip, tiny_model, tiny_tokenizer
from trainings import script, shapes

COUNT = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose card was completed twice, which must be as good as once."""
    folder = tmp_path_factory.mktemp("card")
    data = prepared(shapes(folder / "source", 40), folder / "data", val_share=0, test_share=0.3)
    Clip(tiny_clip(7), tiny_tokenizer(folder / "tokenizer"), HALF).save(folder / "judge" / "clip")
    made = tiny_model(folder / "model")
    (made / "MODEL_CARD.md").write_text("# A model\n\nWhat its author says.\n")
    (made / "manifest.json").write_text('{"defaults": {"steps": 1, "guidance": 2}}')
    arguments = ["--model", made, "--data", data, "--judge", folder / "judge", "--out", folder / "evaluation"]
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            script(patch, "card.py", *arguments, "-n", COUNT, "--seeds", 2)
    return made


def test_the_card_keeps_what_the_author_says_and_has_each_section_once(model: Path) -> None:
    card = (model / "MODEL_CARD.md").read_text()
    assert card.startswith("# A model\n\nWhat its author says.\n\n## Figures\n")
    assert re.findall("^## (.+)", card, re.MULTILINE) == ["Figures", "Pictures", "Memorisation"]
    assert f"{COUNT} captions of the test split" in card
    assert "1 steps at guidance 2" in card
    assert re.search(r"\| R-precision \| [\d.]+ % \([\d.]+ % to [\d.]+ %\) \| [\d.]+ % \(", card)


def test_pairs_of_captions_that_fail_are_named(model: Path) -> None:
    section = (model / "MODEL_CARD.md").read_text().split("### Where another word")[1].split("\n## ")[0]
    failed = re.findall(r"^\| (\w+) \| (.+) \| (.+) \| (\d+)% \|$", section, re.MULTILINE)
    assert failed, "a model of random weights hears nothing"
    assert f"for {len(failed)}:" in section
    assert all(int(right) <= 50 for *_, right in failed)


def test_its_pictures_are_small_and_shown(model: Path) -> None:
    card = (model / "MODEL_CARD.md").read_text()
    for name in ("pictures.webp", "nearest.webp"):
        assert f"]({name})" in card
        assert (model / name).stat().st_size <= 100_000
        with Image.open(model / name) as image:
            assert image.width > 3 * 16
