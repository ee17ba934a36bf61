"""The model that ships: small enough, Diffusers' alone, and what README and card say of it is so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import CLIPModel, CLIPTokenizer

from limner.artifacts import read_json, sha256
from limner.generation import provenance
from limner.generation.model import Model
from limner.models.loading import BUILTIN, load_clip

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
MISSION = {
    "A golden retriever playing in a field.": "a-golden-retriever-playing-in-a-field-7.png",
    "A toddler playing in a sandbox.": "a-toddler-playing-in-a-sandbox-7.png",
}
SEED = 7

DIFFUSERS = """
import sys
sys.modules["limner"] = None  # as if it were not installed
import numpy, torch
from diffusers import DiffusionPipeline
folder, out, seed, steps, guidance, *prompts = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder)
drawn = [
    pipeline(
        prompt, num_inference_steps=int(steps), guidance_scale=float(guidance),
        generator=[torch.Generator().manual_seed(int(seed))],
    ).images[0]
    for prompt in prompts
]
numpy.save(out, numpy.stack(drawn))
"""


@pytest.fixture(scope="module")
def model() -> Model:
    """The built-in model in fp32, as Diffusers loads it."""
    return Model.load("builtin", "cpu", precision="fp32")


@pytest.fixture(scope="module")
def drawn(model: Model) -> np.ndarray:
    """What Limner draws for the prompts of the mission, (2, H, W, 3) uint8."""
    return np.stack([np.asarray(image) for image in model(list(MISSION), seed=SEED).images])


@torch.no_grad()
def test_its_clip_is_small_and_sees_the_same_in_plain_transformers() -> None:
    ours = load_clip("builtin")
    theirs = CLIPModel.from_pretrained(BUILTIN / "clip", dtype=torch.float32).eval()
    assert sum(weights.numel() for weights in theirs.parameters()) <= 12_000_000
    ids = CLIPTokenizer.from_pretrained(BUILTIN / "clip")(list(MISSION), padding="max_length", return_tensors="pt")
    pixels = torch.rand(2, 3, ours.size, ours.size, generator=torch.Generator().manual_seed(0))
    colours = read_json(BUILTIN / "clip" / "preprocessor_config.json")
    mean, std = (torch.tensor(colours[name])[:, None, None] for name in ("image_mean", "image_std"))
    seen = theirs(input_ids=ids["input_ids"], pixel_values=(pixels - mean) / std)
    assert_close(
        ours.text_features(ours.tokenize(list(MISSION))), normalize(seen.text_embeds, dim=1), atol=1e-5, rtol=0
    )
    assert_close(ours.image_features(2 * pixels - 1), normalize(seen.image_embeds, dim=1), atol=1e-5, rtol=0)


def test_it_is_small_and_has_no_pickles() -> None:
    sizes = {path: path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 80_000_000
    assert max(sizes.values()) <= 50_000_000
    assert {path.suffix for path, size in sizes.items() if size > 1_000_000} == {".safetensors"}


def test_it_draws_128_pixels_or_more(drawn: np.ndarray) -> None:
    assert min(drawn.shape[1:3]) >= 128
    assert drawn.std() > 20, "not of one colour"
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 5, "the prompt counts"


def test_diffusers_alone_draws_the_same(model: Model, drawn: np.ndarray, tmp_path: Path) -> None:
    arguments = [BUILTIN, tmp_path / "drawn.npy", SEED, model.spec.steps, model.spec.guidance, *MISSION]
    done = subprocess.run(
        [sys.executable, "-I", "-c", DIFFUSERS, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "drawn.npy").astype(int) - drawn).max() <= 1


def test_the_card_names_the_files() -> None:
    card = (BUILTIN / "MODEL_CARD.md").read_text(encoding="utf-8")
    for file in BUILTIN.rglob("*.safetensors"):
        assert sha256(file) in card, f"{file.name} is another than the card says"
    for heading in ("## Data and licence", "## Intended use", "## Limits", "## Trainings"):
        assert heading in card


@pytest.mark.parametrize("number", range(len(MISSION)), ids=MISSION.values())
def test_the_pictures_in_the_readme_are_its_own(model: Model, drawn: np.ndarray, number: int) -> None:
    from PIL import Image

    prompt, name = list(MISSION.items())[number]
    record = provenance.read(PICTURES / name)
    assert (record["prompt"], record["seed"]) == (prompt, SEED)
    assert record["model"]["weights"] == model.facts["weights"]
    with Image.open(PICTURES / name) as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown - drawn[number]).mean() < 1, "another processor may round differently, no more"
