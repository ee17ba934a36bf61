"""MODEL_CARD.md says what the folder and the manifests say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from limner.artifacts import sha256
from limner.models.card import model_card
from tiny import tiny_clip, tiny_model

MACHINE = {"machine": "x86_64", "cores": 2, "threads": 2, "gpu": None}
FACTS: dict[str, Any] = {
    "parents": {"clip": "1" * 64, "unet": "2" * 64},
    "defaults": {"steps": 12, "guidance": 4.0},
    "trainings": {
        "clip": {"images": 48_000, "seed": 3, "validation": {"loss": 0.5, "r@1": 0.123456}, "hardware": MACHINE},
        "unet": {"images": 8, "seed": 0, "validation": None, "hardware": {**MACHINE, "gpu": "A card"}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both towers of its CLIP."""
    folder = tiny_model(tmp_path_factory.mktemp("card") / "model")
    tiny_clip().save_pretrained(folder / "clip")
    return folder


def test_every_weight_file_is_listed_with_its_class_and_hash(folder: Path) -> None:
    rows = [line for line in model_card(folder, FACTS, "").splitlines() if re.search(r"`[0-9a-f]{64}`", line)]
    files = sorted(folder.rglob("*.safetensors"))
    assert len(rows) == len(files) == 4
    for file in files:
        (row,) = (row for row in rows if row.startswith(f"| {file.parent.name} |"))
        assert f"`{sha256(file)}`" in row
        assert f"{file.stat().st_size:,}" in row
    classes = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows}
    assert classes["unet"] == "UNet2DConditionModel"
    assert classes["clip"] == "CLIPModel"


def test_trainings_are_told_with_machine_and_figures(folder: Path) -> None:
    lines = model_card(folder, FACTS, "").splitlines()
    assert "| CLIP | 48,000 | 3 | 2 CPU cores | loss 0.5, r@1 0.1235 |" in lines
    assert "| U-Net | 8 | 0 | A card |  |" in lines
    assert "## Trainings" not in model_card(folder, {**FACTS, "trainings": {}}, "")


def test_the_clip_is_told_before_and_after_with_intervals(folder: Path) -> None:
    recall = {"value": 0.123456, "low": 0.1, "high": 0.15}
    retrieval = {
        "split": "test",
        "figures": {
            "base": {"text_to_image_r@1": recall, "text_to_image_median_rank": 12.0, "zero_shot_top1": 0.5},
            "alpha 0.4": {
                "text_to_image_r@1": {**recall, "value": 0.14},
                "mean_recall": {"value": 0.25, "standard_error": 0.01},
                "drift": {"last": 0.987654, "penultimate": 0.9},
            },
        },
    }
    card = model_card(folder, {**FACTS, "retrieval": retrieval}, "")
    table = card[card.index("## CLIP, before and after") :].splitlines()
    assert table[2:10] == [
        "| on test pictures | base | alpha 0.4 |",
        "| --- | ---: | ---: |",
        "| text_to_image_r@1 | 0.1235 (0.1 to 0.15) | 0.14 (0.1 to 0.15) |",
        "| text_to_image_median_rank | 12 |  |",
        "| zero_shot_top1 | 0.5 |  |",
        "| mean_recall |  | 0.25 |",
        "| cosine of token states to the base, last layer |  | 0.9877 |",
        "| cosine of token states to the base, penultimate layer |  | 0.9 |",
    ]
    assert "## CLIP" not in model_card(folder, FACTS, "")
    retrieval["figures"] = {"tuned": {"text_to_image_r@1": recall}}
    new = model_card(folder, {**FACTS, "retrieval": retrieval}, "")
    assert "## CLIP\n" in new
    assert "before" not in new


def test_a_grid_and_an_adapter_are_told_where_they_are(folder: Path) -> None:
    card = model_card(folder, FACTS, "")
    assert "grid.png" not in card
    assert "adapter" not in card
    (folder / "grid.png").write_bytes(b"")
    card = model_card(folder, {**FACTS, "parents": {"adapter": "3" * 64}}, "")
    (folder / "grid.png").unlink()
    assert re.search(r"!\[[^]]+\]\(grid\.png\)", card)
    assert "linear adapter" in card


def test_the_authors_text_comes_first(folder: Path) -> None:
    assert model_card(folder, FACTS, "\n# Shapes\n\nFor tests.\n\n").startswith("# Shapes\n\nFor tests.\n\n## Use")
    assert model_card(folder, FACTS, "").startswith("# ")


def test_the_program_on_the_card_is_a_program(folder: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", model_card(folder, FACTS, ""), re.DOTALL)
    compile(program, "MODEL_CARD.md", "exec")
    assert "num_inference_steps=12, guidance_scale=4)" in program
