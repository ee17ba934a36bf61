"""Pictures as training sees them: range, crops, mirroring, and what can't be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from limner.data.pictures import (
    ORIENTATION,
    centre_box,
    jitter,
    load_crop,
    load_pixels,
    may_flip,
    random_box,
    read_picture,
    read_shape,
    save_grid,
    to_mask,
    to_pixels,
)
from limner.errors import DataError
from photos import encoded, photo, put

SIZES = [(16, 16), (40, 24), (24, 40), (100, 17)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A photograph that is wider than high."""
    photo(0, 64, 48).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def ramp(path: Path, width: int, height: int) -> Path:
    """A picture whose red tells the column and whose green tells the row."""
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0] = np.arange(width)
    array[..., 1] = np.arange(height)[:, None]
    Image.fromarray(array).save(path)
    return path


def crop(path: Path, seed: int, *, size: int = 16, min_scale: float = 0.5, flip: bool = False) -> Tensor:
    """A random crop by seed."""
    return load_crop(path, size, np.random.default_rng(seed), min_scale=min_scale, flip=flip)


# ---- pixels


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_picture_becomes_square_pixels_from_minus_1_to_1(tmp_path: Path, width: int, height: int) -> None:
    array = np.zeros((height, width, 3), np.uint8)
    array[:, width // 2 :] = 255
    Image.fromarray(array).save(tmp_path / "p.png")
    for pixels in (load_pixels(tmp_path / "p.png", 16), crop(tmp_path / "p.png", 0)):
        assert pixels.shape == (3, 16, 16)
        assert pixels.dtype == torch.float32
    pixels = load_pixels(tmp_path / "p.png", 16)
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_bytes_become_pixels_and_pixels_bytes(tmp_path: Path) -> None:
    array = np.arange(16 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    Image.fromarray(array).save(tmp_path / "p.png")
    pixels = load_pixels(tmp_path / "p.png", 16)
    assert_close(pixels, torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)
    save_grid(pixels[None], tmp_path / "q.png", columns=1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "q.png")), array)


@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40)])
def test_pixels_are_of_the_centre(tmp_path: Path, width: int, height: int) -> None:
    pixels = load_pixels(ramp(tmp_path / "p.png", width, height), 24)
    corner = ((pixels[:2, 0, 0] + 1) * 127.5).tolist()  # column and row of the first pixel
    assert corner == pytest.approx([(width - 24) / 2, (height - 24) / 2], abs=1e-3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    put(tmp_path, {"p.tiff": encoded(photo().convert(mode), "TIFF")})
    assert load_pixels(tmp_path / "p.tiff", 8).shape == (3, 8, 8)


# ---- crops


def test_a_picture_is_seen_upright_and_16_bits_as_8(tmp_path: Path) -> None:
    wide = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    wide.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").size == (2, 4)
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_picture(tmp_path / "deep.png")).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]


@given(
    size=st.sampled_from(SIZES), seed=st.integers(0, 2**32), min_scale=st.floats(0.1, 1), side=st.sampled_from([8, 16])
)
def test_a_crop_lies_in_the_picture_and_is_large_enough(
    tmp_path_factory: pytest.TempPathFactory, size: tuple[int, int], seed: int, min_scale: float, side: int
) -> None:
    width, height = size
    folder = tmp_path_factory.getbasetemp() / f"ramp-{width}-{height}"
    folder.mkdir(exist_ok=True)
    path = folder / "p.png"
    if not path.exists():
        ramp(path, width, height)
    pixels = crop(path, seed, size=side, min_scale=min_scale)
    assert pixels.shape == (3, side, side)
    columns, rows = ((pixels[i] + 1) * 127.5 for i in (0, 1))
    assert -0.5 <= columns.min() <= columns.max() <= width - 0.5
    assert -0.5 <= rows.min() <= rows.max() <= height - 0.5
    across = (columns.max() - columns.min()).item() * side / (side - 1)  # from the middles of the outer pixels
    least = min_scale**0.5 * min(size)
    assert least - 2.5 <= across <= min(size) + 2.5


def test_a_crop_is_a_function_of_its_randomness(picture: Path) -> None:
    assert torch.equal(crop(picture, 3, flip=True), crop(picture, 3, flip=True))
    assert len({tuple(crop(picture, seed).flatten().tolist()) for seed in range(10)}) == 10


def test_a_crop_of_all_of_a_square_is_the_picture(tmp_path: Path) -> None:
    photo(0, 32, 32).save(tmp_path / "p.png")
    assert torch.equal(crop(tmp_path / "p.png", 0, min_scale=1.0), load_pixels(tmp_path / "p.png", 16))


def test_about_half_the_crops_are_mirrored_where_they_may_be(tmp_path: Path) -> None:
    path = ramp(tmp_path / "p.png", 64, 64)

    def mirrored(seed: int, flip: bool) -> bool:
        pixels = crop(path, seed, flip=flip)
        return bool(pixels[0, 0, 0] > pixels[0, 0, -1])

    assert not any(mirrored(seed, False) for seed in range(50))
    assert 70 < sum(mirrored(seed, True) for seed in range(200)) < 130
    for seed in range(20):  # the same crop otherwise
        assert torch.equal(crop(path, seed, flip=True).sort(dim=-1)[0], crop(path, seed).sort(dim=-1)[0])


@pytest.mark.parametrize(
    ("caption", "allowed"),
    [
        ("A dog on the left of a man.", False),
        ("Right beside the lake", False),
        ("LEFT-handed player", False),
        ("The rightmost of three dogs.", False),
        ("Two dogs run through bright snow.", True),
        ("The leftover cake is upright.", True),
        ("", True),
    ],
)
def test_a_caption_with_a_side_forbids_mirroring(caption: str, allowed: bool) -> None:
    assert may_flip(caption) == allowed


@given(
    picture=st.tuples(st.integers(16, 90), st.integers(16, 90)),
    size=st.tuples(st.integers(16, 64), st.integers(16, 64)),
    seed=st.integers(0, 2**32),
    min_scale=st.floats(0.01, 1),
)
def test_boxes_have_the_shape_that_is_asked_for_and_lie_in_the_picture(
    picture: tuple[int, int], size: tuple[int, int], seed: int, min_scale: float
) -> None:
    image = Image.new("L", picture)
    left, top, right, bottom = centre = centre_box(image, size)
    drawn_box = random_box(image, size, np.random.default_rng(seed), min_scale)
    assert drawn_box == random_box(image, size, np.random.default_rng(seed), min_scale)
    for box in (centre, drawn_box):
        assert 0 <= box[0] < box[2] <= image.width
        assert 0 <= box[1] < box[3] <= image.height
    across, down = right - left, bottom - top
    assert across == image.width or down == image.height, "the largest part"
    assert abs(across * size[0] - down * size[1]) <= max(size) / 2 + 1e-9, "of that shape, to half a pixel"
    assert abs(left - (image.width - right)) <= 1, "from the middle"
    assert abs(top - (image.height - bottom)) <= 1, "from the middle"
    smaller = (drawn_box[2] - drawn_box[0], drawn_box[3] - drawn_box[1])
    assert all(min_scale**0.5 * most - 1 <= side <= most for side, most in zip(smaller, (across, down), strict=True))


def test_a_part_is_read_at_its_place(tmp_path: Path) -> None:
    pixels = to_pixels(read_picture(ramp(tmp_path / "p.png", 40, 30)), (4, 2, 36, 26), (12, 16))
    assert pixels.shape == (3, 12, 16)
    columns, rows = ((pixels[i] + 1) * 127.5 for i in (0, 1))
    assert_close(columns[6], torch.arange(16) * 2 + 4.5, rtol=0, atol=0.7)
    assert_close(rows[:, 8], torch.arange(12) * 2 + 2.5, rtol=0, atol=0.7)


# ---- what is see-through


def see_through(path: Path) -> Path:
    """A red picture, 32 wide and 16 high, whose left quarter can't be seen."""
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 8, 16))
    image.save(path)
    return path


def test_the_header_tells_height_width_and_alpha(tmp_path: Path) -> None:
    photo(0, 64, 48).save(tmp_path / "rgb.png")
    assert read_shape(tmp_path / "rgb.png") == ((48, 64), False)
    assert read_shape(see_through(tmp_path / "rgba.png")) == ((16, 32), True)
    photo(0, 20, 30).quantize(4).save(tmp_path / "p.png", transparency=0)
    assert read_shape(tmp_path / "p.png") == ((30, 20), True)


def test_a_mask_is_the_mean_opacity_of_areas(tmp_path: Path) -> None:
    picture = read_picture(see_through(tmp_path / "p.png"))
    mask = to_mask(picture, (0, 0, 32, 16), (2, 8))
    assert_close(mask, torch.tensor([[[0.0, 0, 1, 1, 1, 1, 1, 1]] * 2]))
    assert_close(to_mask(picture, (2, 0, 10, 16), (1, 2)), torch.tensor([[[0.0, 0.5]]]), rtol=0, atol=1 / 255)
    opaque = to_mask(photo(0, 20, 30), (0, 0, 20, 20), (5, 5))
    assert torch.equal(opaque, torch.ones(1, 5, 5))


def test_what_is_see_through_keeps_its_colour(tmp_path: Path) -> None:
    pixels = load_pixels(see_through(tmp_path / "p.png"), 8)
    assert torch.equal(pixels, torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 8, 8))


# ---- colours


def drawn(seed: int) -> Tensor:
    """Pixels from one end of the range to the other."""
    return torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def jittered(pixels: Tensor, strength: float, seed: int = 0) -> Tensor:
    """The pixels in changed colours, by seed."""
    return jitter(pixels, np.random.default_rng(seed), strength)


@given(st.integers(0, 99), st.floats(0, 0.99), st.integers(0, 2**32))
def test_changed_colours_keep_the_range_and_are_a_function_of_their_randomness(
    picture: int, strength: float, seed: int
) -> None:
    pixels = drawn(picture)
    before, changed = pixels.clone(), jittered(pixels, strength, seed)
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.float32
    assert -1 <= changed.min() <= changed.max() <= 1
    assert torch.equal(changed, jittered(pixels, strength, seed))
    assert torch.equal(pixels, before)


def test_no_strength_changes_no_colour() -> None:
    assert_close(jittered(drawn(0), 0.0), drawn(0), rtol=0, atol=1e-6)


def test_brightness_contrast_and_saturation_change_by_up_to_the_strength() -> None:
    """Far from both ends of the range, where nothing is cut off, the three factors can be read off the picture."""
    unit = drawn(0) * 0.1 + 0.5  # in [0.4, 0.6]
    grey = unit.mean(dim=0, keepdim=True)
    factors = []
    for seed in range(200):
        changed = jittered(unit * 2 - 1, 0.2, seed) * 0.5 + 0.5
        own_grey = changed.mean(dim=0, keepdim=True)
        brightness = changed.mean() / unit.mean()
        contrast = own_grey.std() / grey.std() / brightness
        saturation = (changed - own_grey).std() / (unit - grey).std() / (brightness * contrast)
        factors.append([brightness, contrast, saturation])
    found = torch.tensor(factors)  # (200, 3)
    assert_close(found.amin(dim=0), torch.full((3,), 0.8), rtol=0, atol=0.02)
    assert_close(found.amax(dim=0), torch.full((3,), 1.2), rtol=0, atol=0.02)
    assert found.T.corrcoef().fill_diagonal_(0).abs().max() < 0.3, "each by itself"


# ---- what can't be read


def damaged(how: str) -> bytes:
    """The content of a file that is no whole picture."""
    png = encoded(photo(), "PNG")
    return {"cut": png[:200], "text": b"no picture", "empty": b"", "size": png[:16] + b"\0" * 8 + png[24:]}[how]


@pytest.mark.parametrize("how", ["cut", "text", "empty", "size", "missing"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, how: str) -> None:
    if how != "missing":
        put(tmp_path, {"p.png": damaged(how)})
    for load in (load_pixels, crop):
        with pytest.raises(DataError, match=r"The picture .*p\.png can't be read .*limner prepare"):
            load(tmp_path / "p.png", 8)
    if how != "cut":  # whose header is whole
        with pytest.raises(DataError, match=r"The picture .*p\.png can't be read .*limner prepare"):
            read_shape(tmp_path / "p.png")


# ---- grids


def test_a_grid_is_filled_row_by_row(tmp_path: Path) -> None:
    shades = torch.tensor([-1.0, -0.5, 0.0, 0.5, 3.0])[:, None, None, None].expand(5, 3, 2, 4)
    save_grid(shades, tmp_path / "sub" / "grid.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sub" / "grid.png"))
    assert sheet.shape == (4, 12, 3)
    tiles = [int(sheet[y, x, 0]) for y in (0, 2) for x in (0, 4, 8)]
    assert tiles == [0, 64, 128, 191, 255, 255]  # what is too bright is cut, and the last place is left white
