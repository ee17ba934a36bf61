"""`limner train clip`: captions and pictures come together, in a folder that plain Transformers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from limner.artifacts import read_json
from limner.config import TrainClipConfig
from limner.data.dataset import read_split
from limner.errors import ConfigError, DataError
from limner.models import loading
from limner.stages import train_clip
from trainings import config


def test_it_learns_which_picture_a_caption_belongs_to(data: Path, tmp_path: Path) -> None:
    settings = config(
        TrainClipConfig,
        data,
        tmp_path / "r",
        images=1_600,
        batch_size=16,
        lr=3e-3,
        min_scale=0.9,
        width=32,
        log_every=800,
    )
    figures = read_json(train_clip.run(settings) / "manifest.json")["validation"]
    count = len(read_split(data, "val"))
    assert figures["text_to_image_r@1"] > 2 / count
    names = {f"{way}_r@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    assert set(figures) == {"loss", *names}
    assert figures["loss"] == pytest.approx(1 - sum(figures[name] for name in names) / 6)


@torch.no_grad()
def test_plain_transformers_reads_the_result(clip: Path, data: Path) -> None:
    folder = clip / "model" / "clip"
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    ours = loading.load_clip(str(clip))[0]
    record = read_split(data, "val")[0]
    ids = tokenizer(list(record.captions), padding="max_length", return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 77
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(
        model(input_ids=ids, pixel_values=pixels).logits_per_image,
        ours(input_ids=ids, pixel_values=pixels).logits_per_image,
    )


def test_a_given_clip_keeps_its_sizes_and_tokenizer(clip: Path, data: Path, tmp_path: Path) -> None:
    settings = config(TrainClipConfig, data, tmp_path / "r", model=str(clip), images=8, width=64, vocabulary=4096)
    run = train_clip.run(settings)
    before, after = (loading.load_clip(str(folder)) for folder in (clip, run))
    sizes = [{**c.config.to_dict(), "_name_or_path": ""} for c, _ in (before, after)]
    assert sizes[0] == sizes[1]
    assert before[1].get_vocab() == after[1].get_vocab()
    assert read_json(run / "manifest.json")["parents"]["model"] == loading.identity(str(clip), "clip")


def test_a_vocabulary_without_room_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary 100 is too small"):
        train_clip.run(config(TrainClipConfig, data, tmp_path / "r", vocabulary=100))
    assert list(tmp_path.iterdir()) == []


def test_pictures_without_captions_are_refused(uncaptioned: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no captioned pictures in its train split"):
        train_clip.run(config(TrainClipConfig, uncaptioned, tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []


def test_without_val_there_is_nothing_to_judge_by(no_val: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no captioned pictures in its val split"):
        train_clip.run(config(TrainClipConfig, no_val, tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []
