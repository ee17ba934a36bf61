"""What recipes have in common, and recipes/reconstruct.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner.data.dataset import read_split
from limner.data.pictures import load_pixels
from limner.evaluation.reconstruction import reconstructed
from limner.generation.engine import to_images
from limner.models import loading
from tiny import tiny_model
from trainings import script

ARGUMENTS: dict[str, list[str]] = {
    "base_clip.py": ["--dataset", "nowhere"],
    "card.py": ["--model", "builtin", "--judge", "builtin"],
    "more_latents.py": ["unet", "--model", "builtin", "--vae", "builtin"],
    "other_clip.py": ["--model", "builtin", "--clip", "builtin", "--other", "builtin"],
    "pseudo_captions.py": ["--extra", "nowhere", "--captions", "nowhere", "--teacher", "builtin"],
    "reconstruct.py": ["--vae", "builtin"],
    "teachers.py": ["--extra", "nowhere", "--captions", "nowhere"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_folder_is_a_sentence_and_no_traceback(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="nowhere"):
        script(monkeypatch, name, *ARGUMENTS[name], "--data", "nowhere", "--out", "out")


def test_photographs_go_through_a_vae_and_back(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    script(monkeypatch, "reconstruct.py", "--vae", model, "--data", data, "--out", out, "-n", 2, "--size", 16)
    records = read_split(data, "val")[:2]
    assert sorted(file.name for file in out.iterdir()) == sorted(f"{record.path.stem}.png" for record in records)
    for record in records:
        (wanted,) = to_images(reconstructed(loading.load_vae(str(model)), load_pixels(record.path, 16)[None]))
        with Image.open(out / f"{record.path.stem}.png") as found:
            np.testing.assert_array_equal(found, wanted)
