"""Pictures in memory are scored as the files would be that `limner evaluate` reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limner.data.pictures import save_grid
from limner.evaluation import yardstick
from limner.evaluation.agreement import clip_score, r_precision
from limner.evaluation.distances import cmmd
from limner.evaluation.extractors import features_of
from limner.evaluation.watch import Watch
from limner.evaluation.yardstick import Yardstick
from limner.models.clip import Clip
from tiny import CAPTIONS, tiny_clip, tiny_tokenizer

NORMALISATION = {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 0.75]}
OTHERS = ["A cat.", "A tram in the rain.", "Two dogs run through the snow."]  # the last is a picture's own


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Yardstick:
    """A tiny CLIP that tells captions and pictures apart."""
    folder, network = tmp_path_factory.mktemp("judge"), tiny_clip()
    with torch.no_grad():
        for projection in (network.text_projection, network.visual_projection):
            projection.weight.mul_(50)
    Clip(network, tiny_tokenizer(folder / "tokenizer"), NORMALISATION).save(folder / "clip")
    return Yardstick.find(str(folder))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Pictures larger than the judge reads, as many as `CAPTIONS` (8, 3, 40, 48), of bytes."""
    return torch.randint(256, (8, 3, 40, 48), generator=torch.Generator().manual_seed(1)) / 127.5 - 1


@pytest.fixture(scope="module")
def seen(judge: Yardstick, pixels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What the judge sees in the files of those pictures (8, E)."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{number}.png" for number in range(len(pixels))]
    for picture, path in zip(pixels, paths):
        save_grid(picture[None], path, columns=1)
    return judge.embed(features_of(judge.extractor, paths, 4))


def test_pictures_score_as_their_files_do(judge: Yardstick, pixels: Tensor, seen: Tensor) -> None:
    figures = Watch(judge, CAPTIONS, seen).score(pixels)
    text = judge.text_features(CAPTIONS)
    assert figures["cmmd"] == pytest.approx(0, abs=1e-7)
    assert figures["clip_score"] == pytest.approx(clip_score(text, seen).mean().item(), abs=1e-5)
    assert figures["r_precision"] == r_precision(seen, text, torch.arange(8)).mean().item()
    assert set(figures) == {"cmmd", "clip_score", "r_precision"}
    mirrored = Watch(judge, CAPTIONS, seen).score(-pixels)
    assert mirrored["cmmd"] > 1e-4
    assert mirrored["cmmd"] != figures["cmmd"]
    assert Watch(judge, CAPTIONS, seen[:3]).score(pixels)["cmmd"] == pytest.approx(cmmd(seen[:3], seen), abs=1e-5)


def test_the_batch_does_not_change_the_figures(
    judge: Yardstick, pixels: Tensor, seen: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Watch(judge, CAPTIONS, seen[:5])
    whole = one.score(pixels)
    monkeypatch.setattr(yardstick, "BATCH", 3)
    assert one.score(pixels) == pytest.approx(whole, abs=1e-6)


def test_rivals_are_captions_that_a_pictures_own_is_sought_among(
    judge: Yardstick, pixels: Tensor, seen: Tensor
) -> None:
    text = judge.text_features([*CAPTIONS[:4], *OTHERS[:2]])
    wanted = r_precision(seen[:4], text, torch.arange(4)).mean().item()
    assert Watch(judge, CAPTIONS[:4], seen, OTHERS).score(pixels[:4])["r_precision"] == wanted


def test_a_caption_that_comes_twice_is_no_rival_of_itself(judge: Yardstick, pixels: Tensor, seen: Tensor) -> None:
    assert Watch(judge, ["A dog.", "A dog."], seen).score(pixels[:2])["r_precision"] == 1
    captions = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0], CAPTIONS[2]]
    figures, text = Watch(judge, captions, seen).score(pixels[:4]), judge.text_features(captions)
    assert figures["clip_score"] == pytest.approx(clip_score(text, seen[:4]).mean().item(), abs=1e-5)
    wanted = r_precision(seen[:4], text[[0, 1, 3]], torch.tensor([0, 1, 0, 2])).mean().item()
    assert figures["r_precision"] == wanted
