"""Drawing on a picture that is there already: image to image, and inpainting with any text-to-image U-Net.

As Diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline with a U-Net of four channels: noise is
added to the picture's latents up to a level, and only the steps from there are taken (Meng et al. 2108.01073). What
a mask keeps is put back at each step's noise level (Lugmayr et al. 2201.09865, equation 8, without resampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from limner.data.pictures import centre_box, to_pixels
from limner.generation.jobs import steps_taken
from limner.generation.sources import Source
from limner.models import vae as vaes


@dataclass(frozen=True)
class Canvas:
    """What N drawings begin with in place of noise alone."""

    x0: Tensor
    """Latents (N, C, h, w)."""
    strength: float
    """Share of the steps that are taken, above 0, at most 1."""
    redrawn: Tensor | None
    """(1, 1, h, w): 1 where a mask lets the drawing change, 0 where not; all changes without one."""

    def begin(self, scheduler: Any, noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The noised latents (N, C, h, w) to begin with, of unit noise (N, C, h, w), and the timesteps to take."""
        first = (steps - steps_taken(steps, self.strength)) * scheduler.order
        timesteps: Tensor = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        if self.redrawn is not None and self.strength == 1:  # of what is redrawn nothing shall remain
            return noise * scheduler.init_noise_sigma, timesteps
        latents: Tensor = scheduler.add_noise(self.x0, noise, timesteps[:1].repeat(len(noise)))
        return latents, timesteps

    def hold(self, scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (N, C, h, w) with what is kept put back, at the noise level of `timestep`, (1,), or (0,) at the end.

        `noise` as `begin` had it.
        """
        if self.redrawn is None:
            return latents
        kept = scheduler.add_noise(self.x0, noise, timestep) if len(timestep) else self.x0  # (N, C, h, w)
        return (1 - self.redrawn) * kept + self.redrawn * latents


@dataclass(frozen=True)
class Sketch:
    """A picture and perhaps a mask at the size of the drawing."""

    pixels: Tensor
    """(1, 3, H, W) in [-1, 1]."""
    mask: Tensor | None
    """(1, 1, H, W): 1 is redrawn, 0 kept."""
    strength: float

    @classmethod
    def of(cls, image: Source, mask: Source | None, strength: float, size: tuple[int, int]) -> Sketch:
        """The middle of both, which has the shape of `size`, height and width in pixels."""
        shown = [image.image, *([] if mask is None else [mask.image.resize(image.image.size)])]
        pixels, *masks = (to_pixels(picture, centre_box(picture, size), size)[None] for picture in shown)
        return cls(pixels, (masks[0][:, :1] + 1) / 2 if masks else None, strength)

    def encode(self, vae: Any, sources: Sequence[Generator]) -> Canvas:
        """Latents of the picture, one a generator, which draws them from the VAE's moments and moves on."""
        moments = vaes.encode(vae, self.pixels.to(next(vae.parameters()))).float()  # (1, 2C, h, w)
        mean = moments.chunk(2, dim=1)[0]  # (1, C, h, w)
        if vaes.has_variance(vae.config):
            noise = torch.cat([torch.randn(mean.shape, generator=source) for source in sources]).to(mean)
            drawn = vaes.sample(moments, noise)  # (N, C, h, w)
        else:
            drawn = mean.expand(len(sources), -1, -1, -1)
        redrawn = None
        if self.mask is not None:
            redrawn = interpolate((self.mask >= 0.5).float(), size=mean.shape[2:]).to(mean)  # (1, 1, h, w)
        return Canvas(vaes.to_latents(vae.config, drawn), self.strength, redrawn)

    def composite(self, pixels: Tensor) -> Tensor:
        """Drawn pixels (N, 3, H, W) where the mask is white, the picture's own where it is black."""
        if self.mask is None:
            return pixels
        mask, kept = self.mask.to(pixels), self.pixels.to(pixels)
        return kept + mask * (pixels.clamp(-1, 1) - kept)
