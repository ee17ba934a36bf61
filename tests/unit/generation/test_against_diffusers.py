"""Our loop draws what Diffusers' StableDiffusionPipeline draws from the same folder, seed and settings.

Diffusers runs in a process of its own where limner can't be imported, which shows besides that the folders are
Diffusers' alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.errors import ModelError
from limner.generation.model import Model
from tiny import SCHEDULERS, tiny_model, tiny_taesd, tiny_unet

UNFIT = {"flow-match"}
"""Schedulers that StableDiffusionPipeline can't use."""

VARIANTS: dict[str, dict[str, Any]] = {
    "taesd": {"vae": tiny_taesd},
    "embedded-guidance": {"unet": lambda: tiny_unet(time_cond_proj_dim=16)},
    "v-attention-everywhere": {
        "unet": lambda: tiny_unet(down_block_types=("CrossAttnDownBlock2D",) * 2, attention_head_dim=4)
    },
}


@dataclass(frozen=True)
class Case:
    """One picture."""

    folder: str
    guidance: float
    prompt: str = "A brown dog on the beach."
    negative: str = ""
    width: int = 16
    height: int = 16
    steps: int = 5
    seed: int = 3


CASES = [
    *(Case(name, guidance) for name in SCHEDULERS if name not in UNFIT for guidance in (1.0, 7.5)),
    *(Case(name, guidance) for name in VARIANTS for guidance in (1.0, 7.5)),
    Case("ddim", 4.0, negative="People ride bicycles."),
    Case("ddim", 4.0, prompt="a " * 75),  # a token each: as long as CLIP reads
    Case("dpm-flow", 4.0, width=32, height=24),
    Case("pndm", 4.0, steps=1),
    Case("unipc", 4.0, steps=25),
]

DIFFUSERS = """
import json, sys, warnings
sys.modules["limner"] = None
warnings.simplefilter("ignore")
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
root, cases, unfit = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
pipelines, drawn = {}, {}
def call(case):
    name = case["folder"]
    if name not in pipelines:
        pipelines[name] = DiffusionPipeline.from_pretrained(f"{root}/{name}")
        pipelines[name].set_progress_bar_config(disable=True)
    return pipelines[name](
        case["prompt"], negative_prompt=case["negative"], num_inference_steps=case["steps"],
        guidance_scale=case["guidance"], width=case["width"], height=case["height"],
        generator=[torch.Generator().manual_seed(case["seed"])],
    ).images[0]
for number, case in enumerate(cases):
    drawn[str(number)] = numpy.asarray(call(case))
numpy.savez(f"{root}/drawn.npz", **drawn)
for name in unfit:
    try:
        call(cases[0] | {"folder": name})
    except AttributeError:
        continue
    sys.exit(f"{name} works")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model folder for each scheduler and each variant of the networks."""
    root = tmp_path_factory.mktemp("models")
    for name in SCHEDULERS:
        tiny_model(root / name, name)
    for name, parts in VARIANTS.items():
        tiny_model(root / name, "dpm", **{part: make() for part, make in parts.items()})
    return root


@pytest.fixture(scope="module")
def theirs(root: Path) -> list[np.ndarray]:
    """What Diffusers draws for each case, (H, W, 3) uint8."""
    arguments = [str(root), json.dumps([asdict(case) for case in CASES]), json.dumps(sorted(UNFIT))]
    done = subprocess.run(
        [sys.executable, "-I", "-c", DIFFUSERS, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(root / "drawn.npz") as drawn:
        return [drawn[str(number)] for number in range(len(CASES))]


def draw(root: Path, case: Case) -> np.ndarray:
    """What Limner draws for a case, (H, W, 3) uint8."""
    drawn = Model.load(str(root / case.folder), "cpu", precision="fp32")(
        case.prompt,
        seed=case.seed,
        steps=case.steps,
        guidance=case.guidance,
        negative=case.negative,
        size=f"{case.width}x{case.height}",
    )
    return np.asarray(drawn.images[0])


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures in a colour of a pixel."""
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.folder} {c.guidance:g} {c.steps}" for c in CASES])
def test_the_picture_is_that_of_diffusers(root: Path, theirs: list[np.ndarray], number: int) -> None:
    ours = draw(root, CASES[number])
    assert ours.std() > 5, "a picture of one colour proves nothing"
    assert difference(ours, theirs[number]) <= 1


def test_every_setting_shows(root: Path, theirs: list[np.ndarray]) -> None:
    """The comparison above would notice a setting that is not passed on."""
    case = Case("ddim", 4.0, negative="People ride bicycles.")
    theirs_of_it = theirs[CASES.index(case)]
    for other in (
        Case("ddim", 4.5, negative=case.negative),
        Case("ddim", 4.0),
        Case("ddim", 4.0, negative=case.negative, steps=6),
        Case("ddim", 4.0, negative=case.negative, seed=4),
        Case("ddim", 4.0, negative=case.negative, prompt="People ride bicycles."),
        Case("pndm", 4.0, negative=case.negative),
    ):
        assert difference(draw(root, other), theirs_of_it) > 1, other


@pytest.mark.parametrize("name", sorted(UNFIT))
@pytest.mark.usefixtures("theirs")  # which fails where Diffusers can use it
def test_schedulers_that_do_not_fit_the_pipeline_are_refused(root: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is not for a StableDiffusionPipeline"):
        Model.load(str(root / name), "cpu")
