"""Aspect-ratio buckets: sizes of about one area, of which each picture takes the one that cuts off least."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from limner.data.buckets import bucket_sizes, nearest
from limner.data.pictures import centre_box


def test_sizes_of_stable_diffusion() -> None:
    """As the tables of trainers of Stable Diffusion have them, but for shapes of more than four to one."""
    wide = [(256, 1024), (320, 768), (384, 640), (448, 576)]
    assert bucket_sizes(512, 64) == [*wide, (512, 512), *((width, height) for height, width in reversed(wide))]


@given(st.integers(1, 20), st.integers(1, 40))
def test_sizes_are_multiples_of_the_step_and_of_at_most_the_area_of_the_square(step: int, times: int) -> None:
    side = step * times
    sizes = bucket_sizes(side, step)
    assert (side, side) in sizes
    assert sizes == sorted(sizes), "from the widest to the highest"
    assert {(width, height) for height, width in sizes} == set(sizes), "as many upright as lying"
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= side**2 < min(height, width) * (max(height, width) + step)
        assert min(height, width) >= side / 2


@given(st.integers(16, 3000), st.integers(16, 3000))
def test_the_nearest_size_is_that_of_which_most_is_kept(height: int, width: int) -> None:
    sizes = bucket_sizes(512, 64)

    def kept(size: tuple[int, int]) -> float:
        left, top, right, bottom = centre_box(Image.new("1", (width, height)), size)
        return (right - left) * (bottom - top) / (width * height)

    chosen = nearest((height, width), sizes)
    assert kept(chosen) == pytest.approx(max(map(kept, sizes)), rel=2 / min(height, width))
