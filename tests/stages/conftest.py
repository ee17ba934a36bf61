"""A dataset of shapes and one tiny run of each stage, made once for all tests that start from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from limner.config import EncodeConfig, PrepareConfig, TrainClipConfig, TrainUnetConfig, TrainVaeConfig
from limner.models import loading
from limner.models.clip import HALF, Clip
from limner.settings import resolve
from limner.stages import encode, prepare, train_clip, train_unet, train_vae
from photos import encoded, photo, put
from tiny import tiny_clip, tiny_tokenizer
from trainings import config, shapes


def prepared(source: Path, out: Path, **settings: object) -> Path:
    """A dataset folder of a source."""
    values = {"kind": "imagefolder", "source": source, "out": out, "workers": 1, **settings}
    return prepare.run(resolve(PrepareConfig, values))


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs below lie."""
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="session")
def data(stages: Path) -> Path:
    """A dataset of 32 pictures of shapes, five captions each."""
    return prepared(shapes(stages / "source", 32), stages / "data", val_share=0.25)


@pytest.fixture(scope="session")
def no_val(stages: Path, data: Path) -> Path:
    """The same pictures, none of them in val."""
    return prepared(stages / "source", stages / "no-val", val_share=0, test_share=0)


@pytest.fixture(scope="session")
def uncaptioned(stages: Path) -> Path:
    """Pictures without captions."""
    source = shapes(stages / "bare", 12)
    (source / "metadata.jsonl").unlink()
    return prepared(source, stages / "uncaptioned", uncaptioned=True, val_share=0.4, test_share=0)


@pytest.fixture(scope="session")
def photographs(stages: Path) -> Path:
    """Pictures of three shapes, one caption each, of which those as high as wide have an alpha channel."""
    files = {}
    for number in range(36):
        width, height = ((60, 36), (36, 60), (48, 48))[number % 3]
        image = photo(number, width, height)
        if width == height:
            image.putalpha(Image.new("L", image.size, 255 * (number % 2)))
        files |= {f"{number}.png": encoded(image, "PNG"), f"{number}.txt": b"A field of colours."}
    source = put(stages / "photographs", files)
    return prepared(source, stages / "photographs-data", keep_alpha=True, val_share=0.35, test_share=0)


@pytest.fixture(scope="session")
def clip(stages: Path, data: Path) -> Path:
    """A run of `train clip`."""
    return train_clip.run(config(TrainClipConfig, data, stages / "clip"))


@pytest.fixture(scope="session")
def vae(stages: Path, data: Path) -> Path:
    """A run of `train vae`."""
    return train_vae.run(config(TrainVaeConfig, data, stages / "vae"))


@pytest.fixture(scope="session")
def latents(stages: Path, data: Path, clip: Path, vae: Path) -> Path:
    """A run of `encode`."""
    return encode.run(config(EncodeConfig, data, stages / "latents", clip=str(clip), vae=str(vae)))


@pytest.fixture(scope="session")
def bucketed(stages: Path, photographs: Path, clip: Path, vae: Path) -> Path:
    """A run of `encode` with buckets, several views and masks."""
    settings = {"clip": str(clip), "vae": str(vae), "buckets": True, "bucket_step": 4, "views": 3}
    return encode.run(config(EncodeConfig, photographs, stages / "bucketed", **settings))


@pytest.fixture(scope="session")
def unet(stages: Path, latents: Path) -> Path:
    """A run of `train unet`."""
    return train_unet.run(config(TrainUnetConfig, latents, stages / "unet"))


@pytest.fixture(scope="session")
def teacher(stages: Path) -> Path:
    """A CLIP's folder, whose features are wider than those of its pupils."""
    network = tiny_clip(seed=7)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)  # so that features differ clearly
    with loading.quiet():
        Clip(network, tiny_tokenizer(stages / "words"), HALF).save(stages / "teacher")
    return stages / "teacher"
