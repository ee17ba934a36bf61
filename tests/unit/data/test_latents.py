"""The latent cache: what is written comes back, and half a cache is none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from limner.data.latents import LatentCache, array_path, write_array, write_captions
from limner.errors import DataError

CAPTIONS = [["a dog", "a puppy"], [], ["a cat"]]


def moments() -> Tensor:
    """Two views of three pictures (3, 2, 8, 4, 4)."""
    return torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def states() -> Tensor:
    """Token states of the three captions (3, 5, 6)."""
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run folder of a finished encoding."""
    for split in ("train", "val"):
        write_array(tmp_path / "cache" / split / "moments.npy", (3, 2, 8, 4, 4), moments().split(2))
        write_array(tmp_path / "cache" / split / "states.npy", (3, 5, 6), [states()])
        write_captions(tmp_path / "cache" / split / "captions.json", CAPTIONS)
    write_array(tmp_path / "cache" / "empty.npy", (1, 5, 6), [torch.full((1, 5, 6), 7.0)])
    (tmp_path / "manifest.json").write_text(json.dumps({"parents": {}, "finished": "now"}))
    return tmp_path


def files(folder: Path) -> list[Path]:
    """All files below a folder, hidden ones too."""
    return [p for p in folder.rglob("*") if p.is_file()]


# ---- what is written comes back


def test_views_and_states_come_back_in_half_precision(folder: Path) -> None:
    cache = LatentCache(folder, "train")
    assert len(cache) == 3
    assert cache.views == 2
    assert cache.captions == CAPTIONS
    half = [x.half().float() for x in (moments(), states())]
    for index in range(3):
        for view in range(2):
            assert torch.equal(cache.view(index, view), half[0][index, view])
    assert torch.equal(cache.states(0, 0), half[1][0])
    assert torch.equal(cache.states(0, 1), half[1][1])
    assert torch.equal(cache.states(2, 0), half[1][2]), "pictures without captions take no row"
    assert torch.equal(cache.states(1, None), torch.full((5, 6), 7.0))
    assert cache.view(0, 0).dtype == cache.states(0, 0).dtype == torch.float32


def test_what_is_read_can_be_changed_without_changing_the_cache(folder: Path) -> None:
    cache = LatentCache(folder, "train")
    cache.view(0, 0).zero_()
    cache.states(0, None).zero_()
    assert_close(cache.view(0, 0), moments()[0, 0], rtol=1e-2, atol=1e-2)
    assert cache.states(0, None).min() == 7


def test_a_split_may_be_empty(folder: Path) -> None:
    write_array(folder / "cache" / "val" / "moments.npy", (0, 2, 8, 4, 4), [])
    write_array(folder / "cache" / "val" / "states.npy", (0, 5, 6), [])
    write_captions(folder / "cache" / "val" / "captions.json", [])
    assert len(LatentCache(folder, "val")) == 0


def test_an_array_is_a_plain_numpy_file(folder: Path) -> None:
    array = np.load(folder / "cache" / "train" / "moments.npy")
    assert array.dtype == np.float16
    assert array.shape == (3, 2, 8, 4, 4)


# ---- buckets and masks

ROWS = {"8x8": [2, 0], "12x4": [1]}  # pictures by size, WIDTHxHEIGHT


@pytest.fixture
def bucketed(folder: Path) -> Path:
    """The same, with its train pictures in two buckets, of which the first has masks."""
    train = folder / "cache" / "train"
    (train / "moments.npy").unlink()
    write_array(array_path(train, "moments", "8x8"), (2, 2, 8, 4, 4), [moments()[[2, 0]]])
    write_array(array_path(train, "masks", "8x8"), (2, 2, 1, 4, 4), [moments()[[2, 0], :, :1].abs().clamp(max=1)])
    write_array(array_path(train, "moments", "12x4"), (1, 2, 8, 2, 6), [moments()[:1, :, :, :3].reshape(1, 2, 8, 2, 6)])
    (train / "buckets.json").write_text(json.dumps(ROWS))
    return folder


def test_pictures_are_found_in_their_buckets(bucketed: Path) -> None:
    cache = LatentCache(bucketed, "train")
    assert len(cache) == 3
    assert cache.views == 2
    assert cache.bucket.tolist() == [0, 1, 0]
    half = moments().half().float()
    for view in range(2):
        assert torch.equal(cache.view(0, view), half[0, view])
        assert torch.equal(cache.view(2, view), half[2, view])
        assert torch.equal(cache.view(1, view), half[0, view, :, :3].reshape(8, 2, 6))
        for index in (0, 2):
            mask = cache.mask(index, view)
            assert mask is not None
            assert torch.equal(mask, half[index, view, :1].abs().clamp(max=1))
        assert cache.mask(1, view) is None
    assert {name: value.shape for name, value in cache.shown(0, 1).items()} == {"moments": (8, 4, 4), "mask": (1, 4, 4)}
    assert set(cache.shown(1, 1)) == {"moments"}
    assert torch.equal(cache.states(2, 0), states()[2].half().float())


def test_without_buckets_all_pictures_are_in_one(folder: Path) -> None:
    cache = LatentCache(folder, "train")
    assert cache.bucket.tolist() == [0, 0, 0]
    assert set(cache.shown(0, 0)) == {"moments"}
    write_array(folder / "cache" / "train" / "masks.npy", (3, 2, 1, 4, 4), [torch.full((3, 2, 1, 4, 4), 0.5)])
    assert torch.equal(LatentCache(folder, "train").shown(2, 1)["mask"], torch.full((1, 4, 4), 0.5))


@pytest.mark.parametrize(
    "rows",
    [{"8x8": [2, 0]}, {"8x8": [2], "12x4": [1]}, {**ROWS, "12x4": [0]}, {"8x8": [0], "12x4": [1, 2]}, [1], {"8x8": 2}],
)
def test_buckets_of_another_cache_are_refused(bucketed: Path, rows: object) -> None:
    (bucketed / "cache" / "train" / "buckets.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="damaged"):
        LatentCache(bucketed, "train")


def test_masks_of_another_cache_are_refused(bucketed: Path) -> None:
    write_array(bucketed / "cache" / "train" / "masks-8x8.npy", (1, 2, 1, 4, 4), [torch.zeros(1, 2, 1, 4, 4)])
    with pytest.raises(DataError, match="damaged"):
        LatentCache(bucketed, "train")


def test_a_cache_is_not_held_in_memory_nor_sent_to_another_process(bucketed: Path) -> None:
    cache = LatentCache(bucketed, "train")
    assert all(isinstance(array, np.memmap) for array in (*cache._moments, cache._masks[0], cache._states))
    sent = pickle.dumps(cache)
    assert len(sent) < 1_000
    assert torch.equal(pickle.loads(sent).view(2, 1), cache.view(2, 1))


# ---- half an array is none


def breaking() -> Iterator[Tensor]:
    """A piece, and then an error."""
    yield torch.zeros(2, 3)
    raise KeyboardInterrupt


def test_an_interrupted_array_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_array(tmp_path / "a.npy", (4, 3), breaking())
    assert files(tmp_path) == []


@pytest.mark.parametrize("rows", [3, 5])
def test_an_array_of_other_length_is_our_mistake_and_leaves_nothing(tmp_path: Path, rows: int) -> None:
    with pytest.raises((AssertionError, ValueError)):
        write_array(tmp_path / "a.npy", (4, 3), [torch.zeros(rows, 3)])
    assert files(tmp_path) == []


# ---- a cache that is none


@pytest.mark.parametrize("manifest", [None, '{"parents": {}}'], ids=["never begun", "unfinished"])
def test_an_unfinished_run_is_refused(folder: Path, manifest: str | None) -> None:
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="not a finished run of `limner encode`"):
        LatentCache(folder, "train")


def test_a_finished_run_of_another_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"parents": {}, "finished": "now"}))
    with pytest.raises(DataError, match="not a finished run of `limner encode`"):
        LatentCache(tmp_path, "train")


@pytest.mark.parametrize("name", ["train/moments.npy", "train/states.npy", "empty.npy", "train/captions.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "cut"])
def test_a_damaged_cache_is_refused(folder: Path, name: str, how: str) -> None:
    file = folder / "cache" / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=r"damaged .*; encode into a new folder") as caught:
        LatentCache(folder, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("captions", [CAPTIONS[:2], [*CAPTIONS, []], [["a dog"], [], ["a cat"]], {"a": 1}, [1, 2, 3]])
def test_captions_of_another_cache_are_refused(folder: Path, captions: object) -> None:
    (folder / "cache" / "train" / "captions.json").write_text(json.dumps(captions))
    with pytest.raises(DataError, match="damaged"):
        LatentCache(folder, "train")
