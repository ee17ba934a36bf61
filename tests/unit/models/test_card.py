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


def test_the_authors_text_comes_first(folder: Path) -> None:
    assert model_card(folder, FACTS, "\n# Shapes\n\nFor tests.\n\n").startswith("# Shapes\n\nFor tests.\n\n## Use")
    assert model_card(folder, FACTS, "").startswith("# ")


def test_the_program_on_the_card_is_a_program(folder: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", model_card(folder, FACTS, ""), re.DOTALL)
    compile(program, "MODEL_CARD.md", "exec")
    assert "num_inference_steps=12, guidance_scale=4)" in program
