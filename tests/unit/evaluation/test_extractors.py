"""Features of pictures by any network, and their cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

import fidelity
from limner.errors import ConfigError, DataError, ModelError, UserError
from limner.evaluation import extractors
from limner.evaluation.extractors import Extractor, Network, batches, features_of, load_extractor, text_features_of
from limner.models.clip import Clip
from photos import jpeg, put


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five photographs."""
    put(tmp_path / "pictures", {f"{seed}.jpg": jpeg(seed) for seed in range(5)})
    return [tmp_path / "pictures" / f"{seed}.jpg" for seed in range(5)]


def means(pixels: Tensor) -> Tensor:
    """The mean colour of pixels (N, 3, H, W) -> (N, 3)."""
    return pixels.mean(dim=(2, 3))


def test_features_do_not_depend_on_the_batch(clip: Clip, paths: list[Path]) -> None:
    extractor = extractors.clip_extractor("tiny", clip, "0")
    whole = features_of(extractor, paths)
    assert whole.shape == (5, 16)
    assert torch.allclose(features_of(extractor, paths, batch_size=2), whole, atol=1e-6)
    assert [len(part) for part in batches(extractor, paths, 2)] == [2, 2, 1]


def test_kept_features_are_read_only_for_the_same_pictures_and_weights(paths: list[Path], tmp_path: Path) -> None:
    calls = []

    def see(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return means(pixels)

    cache = tmp_path / "cache"
    first = features_of(Network("means", "0", 8, see), paths, cache=cache)
    assert torch.equal(features_of(Network("means", "0", 8, see), paths, cache=cache), first)
    assert calls == [5]
    for other in (Network("means", "1", 8, see), Network("means", "0", 9, see), Network("others", "0", 8, see)):
        features_of(other, paths, cache=cache)
    backwards = features_of(Network("means", "0", 8, see), paths[::-1], cache=cache)
    assert torch.equal(backwards, first.flip(0))
    paths[0].write_bytes(jpeg(9))
    assert not torch.equal(features_of(Network("means", "0", 8, see), paths, cache=cache), first)
    assert calls == [5] * 6
    assert len(list(cache.iterdir())) == 6


class Lengths:
    """Reads of a caption how long it is, and remembers what it was given."""

    name = "lengths"

    def __init__(self, sha256: str = "0") -> None:
        self.sha256, self.read = sha256, []

    def text_features(self, captions: Sequence[str]) -> Tensor:
        self.read += captions
        return torch.tensor([[len(caption), 1.0] for caption in captions])


def test_each_text_is_read_once_and_kept_for_the_same_captions_and_weights(tmp_path: Path) -> None:
    reader, other = Lengths(), Lengths("1")
    captions = [f"{'very ' * (n % 700)}long" for n in range(1_000)]
    found = text_features_of(reader, captions, cache=tmp_path)
    assert found[:, 0].tolist() == [len(caption) for caption in captions]
    assert sorted(reader.read) == sorted(set(captions))
    assert torch.equal(text_features_of(reader, captions[::-1], cache=tmp_path), found.flip(0))
    assert len(reader.read) == 700, "the order they are asked for in is no other set of captions"
    text_features_of(other, captions, cache=tmp_path)
    text_features_of(reader, captions[:3], cache=tmp_path)
    assert (len(other.read), len(reader.read), len(list(tmp_path.iterdir()))) == (700, 703, 3)


def test_a_picture_without_numbers_is_named(paths: list[Path]) -> None:
    def see(pixels: Tensor) -> Tensor:
        found = means(pixels)
        found[1, 0] = torch.nan
        return found

    with pytest.raises(DataError, match=r"blind sees no numbers in the picture .*3\.jpg; "):
        list(batches(Network("blind", "0", 8, see), paths[2:], 5))


def test_a_damaged_picture_is_named(paths: list[Path]) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    with pytest.raises(DataError, match=r"3\.jpg can't be read"):
        features_of(Network("means", "0", 8, means), paths)


def test_a_clip_by_name_sees_what_its_image_tower_sees(clip: Clip, tmp_path: Path) -> None:
    clip.save(tmp_path / "clip")
    found = load_extractor(f"clip:{tmp_path / 'clip'}")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert (found.size, found.filter, len(found.sha256)) == (16, "lanczos", 64)
    assert torch.allclose(found.image_features(pixels), clip.image_features(pixels).detach(), atol=1e-6)


def vit(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)


def resnet(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder)


@pytest.mark.parametrize(("make", "size"), [(vit, 16), (resnet, 224)])
def test_any_image_model_of_transformers_is_an_extractor(
    make: Callable[[Path], None], size: int, tmp_path: Path
) -> None:
    make(tmp_path)
    found: Extractor = load_extractor(f"transformers:{tmp_path}")
    features = found.image_features(torch.rand(2, 3, size, size) * 2 - 1)
    assert (found.size, features.shape) == (size, (2, 16))
    assert not torch.allclose(features[0], features[1])
    assert found.sha256 == load_extractor(f"transformers:{tmp_path}").sha256


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("clip", ConfigError, "write clip:REF, judge:FOLDER"),
        ("clip:", ConfigError, "write clip:REF, judge:FOLDER"),
        ("vgg:16", ConfigError, "vgg:16 names no extractor"),
        ("judge:nowhere", ModelError, "nowhere holds no judge .*recipes/judge.py"),
        ("clip:./nowhere", ModelError, "nowhere"),
        ("transformers:./nowhere", ModelError, "nowhere"),
        ("inception", ModelError, "torchvision of your torch|weights-inception"),
    ],
)
def test_what_is_no_extractor_is_said_in_a_sentence(
    spec: str, error: type[UserError], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(error, match=words) as caught:
        load_extractor(spec)
    assert "\n" not in str(caught.value)


def test_a_clip_is_no_image_model(clip: Clip, tmp_path: Path) -> None:
    clip.save(tmp_path)
    with pytest.raises(ModelError, match="a CLIP is clip:"):
        load_extractor(f"transformers:{tmp_path}")


def test_the_inception_is_that_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With random weights in the file that its release has, and bytes as it reads them."""
    theirs = fidelity.part("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(theirs, "load_state_dict", lambda *_, **__: None)
        network = theirs("random", ["2048"], feature_extractor_weights_path="none")
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / extractors.INCEPTION)
    found, photo = load_extractor("inception"), torch.randint(256, (1, 3, 299, 299))
    features = found.image_features(photo / 127.5 - 1)
    assert (found.name, found.size, features.shape) == ("inception", 299, (1, 2048))
    assert torch.allclose(features, network(photo.byte())[0], atol=1e-6)
