"""Figures of a model's parts: what its VAE gives back, how its CLIP retrieves, what drawing costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from limner.data.dataset import Record
from limner.data.pictures import load_pixels
from limner.errors import ModelError
from limner.evaluation.alignment import Judged
from limner.evaluation.extractors import Extractor
from limner.evaluation.intervals import Interval, mean_interval
from limner.evaluation.reconstruction import WINDOW, feature_distance, psnr, reconstructed, ssim
from limner.evaluation.retrieval import KS
from limner.evaluation.scores import Figures
from limner.models import loading
from limner.models.vae import factor
from limner.progress import progress

MOST = 500  # photographs that go through a VAE, whose figures vary little between them


@torch.no_grad()
def vae_figures(vae: Any, size: int, paths: Sequence[Path], extractor: Extractor | None, batch_size: int) -> Figures:
    """PSNR, SSIM and, with an extractor, feature distance of the first `MOST` photographs through a VAE and back.

    They are `size` pixels a side, or a little less where the VAE's factor asks for it. Raises DataError.
    """
    size -= size % factor(vae.config)
    paths = paths[:MOST]
    found = defaultdict(list)
    with progress("Photographs through the VAE", len(paths)) as advance:
        for start in range(0, len(paths), batch_size):
            pixels = torch.stack([load_pixels(path, size) for path in paths[start : start + batch_size]])
            again = reconstructed(vae, pixels.to(vae.device)).float().cpu()  # (N, 3, size, size)
            found["psnr"].append(psnr(again, pixels))
            if size >= WINDOW:
                found["ssim"].append(ssim(again, pixels))
            if extractor is not None:
                before, after = (extractor.image_features(_enlarged(x, extractor.size)) for x in (pixels, again))
                found["vae_distance"].append(feature_distance(after, before))
            advance(len(pixels))
    return {name: mean_interval(torch.cat(parts)) for name, parts in found.items()}


def _enlarged(pixels: Tensor, size: int) -> Tensor:
    """Pixels (N, 3, H, W) as an extractor reads them -> (N, 3, size, size)."""
    return interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def clip_figures(model: str, records: Sequence[Record]) -> Figures:
    """Recall both ways of a model's own CLIP, with all captions of photographs; none where it has no image tower.

    Raises DataError where a photograph can't be read.
    """
    try:
        clip = loading.load_clip(model)
    except ModelError:
        return {}
    row = Judged(records).row(clip, None)
    names = [f"{way}_r@{k}" for way in ("text_to_image", "image_to_text") for k in KS]
    return {name: Interval(**row[name], count=len(records)) for name in names}


def cost_figures(cost: dict[str, Any] | None) -> Figures:
    """Seconds a picture, a number a batch, as `drawing` keeps them; and the most memory in MiB, measured once."""
    figures = {}
    if cost is not None and cost["seconds"]:
        figures["seconds"] = mean_interval(torch.tensor(cost["seconds"], dtype=torch.double))
    if cost is not None and cost["memory"] is not None:
        memory = cost["memory"] / 2**20
        figures["memory"] = Interval(memory, memory, memory, 1)
    return figures
