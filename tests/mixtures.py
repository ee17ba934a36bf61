"""A mixture of Gaussians as latents: the best network there is for it, and a task that learns it.

Each place of the latents is a draw of its own, so that a few latents are thousands of draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limner.config import TrainUnetConfig
from limner.diffusion import schedulers
from limner.diffusion.objectives import TIMESTEPS, Objective, draw_noise, draw_t, level, target, usual_levels
from limner.models import vae as vaes
from limner.stages.train_unet import TrainUnet
from limner.training.stream import Example, Stream


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one deviation at `modes` (K, C), with `shares` (K,)."""

    modes: Tensor
    shares: Tensor
    std: float

    def expected(self, noised: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The mean of x0 given alpha x0 + sigma noise, by Bayes' rule -> (N, C, h, w)."""
        z = noised.double()[None]  # (1, N, C, h, w)
        modes = self.modes.double()[:, None, :, None, None]  # (K, 1, C, 1, 1)
        variance = alpha**2 * self.std**2 + sigma**2
        surprise = z - alpha * modes  # (K, N, C, h, w)
        logits = self.shares.log()[:, None, None, None, None] - surprise.square().sum(2, keepdim=True) / (2 * variance)
        within = modes + alpha * self.std**2 / variance * surprise
        return (logits.softmax(0) * within).sum(0)

    def found(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Share, centre and deviation of what lies nearest each mode. (N, C, h, w) -> (K,), (K, C), (K,)."""
        points = latents.movedim(1, -1).flatten(0, -2)  # (M, C)
        nearest = torch.cdist(points, self.modes).argmin(1)
        own = [points[nearest == k] for k in range(len(self.modes))]
        shares = torch.tensor([len(some) / len(points) for some in own])
        centres = torch.stack([some.mean(0) for some in own])
        deviations = [(some - some.mean(0)).square().mean(0).sqrt().mean() for some in own]
        return shares, centres, torch.stack(deviations)


THREE = Mixture(torch.tensor([[-1.2, 0.6], [0.9, 0.9], [0.6, -1.2]]), torch.tensor([0.5, 0.3, 0.2]), 0.2)
"""Of about unit variance, as latents are."""


class Best:
    """The network that can't be bettered: what its objective wants, of the expected x0 and noise."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, mixture: Mixture, objective: Objective, betas: Tensor | None) -> None:
        self.mixture, self.objective, self.betas = mixture, objective, betas
        self.told: list[float] = []

    def __call__(self, latents: Tensor, told: Tensor, **_: Any) -> tuple[Tensor]:
        self.told.append(float(told))
        t = told / TIMESTEPS if self.objective == "flow" else (told + 0.5) / TIMESTEPS
        alpha, sigma = level(self.objective, t[None].double(), self.betas)
        x0 = self.mixture.expected(latents, alpha, sigma)
        noise = (latents - alpha * x0) / sigma
        return (target(self.objective, x0, noise, alpha, sigma).to(latents.dtype),)


class Pixelwise(nn.Module):
    """A network of a few thousand weights that sees one place of the latents at a time, called as a U-Net is."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, channels: int = 2, width: int = 64) -> None:
        super().__init__()
        self.start = nn.Conv2d(channels, width, 1)
        self.time = nn.Linear(17, width)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU()
        )
        self.end = nn.Conv2d(width, channels, 1)

    def forward(self, latents: Tensor, told: Tensor, **_: Any) -> tuple[Tensor]:
        """latents (N, C, h, w), told (N,) or () -> (N, C, h, w)."""
        t = (told.to(latents) / TIMESTEPS).reshape(-1, 1)
        angles = t * math.pi * 2.0 ** torch.arange(8)  # (N, 8)
        embedding = self.time(torch.cat([t, angles.sin(), angles.cos()], dim=1))  # (N, width)
        return (self.end(self.rest(self.start(latents) + embedding[:, :, None, None])),)


class Latents:
    """What `TrainUnet` asks of a run of `limner encode`, of a VAE that changes nothing."""

    @staticmethod
    def latents(batch: dict[str, Tensor]) -> Tensor:
        """As `Encoded.latents`."""
        return vaes.to_latents({"scaling_factor": 1.0}, vaes.sample(batch["moments"], batch["draw"]))


class Toy(TrainUnet):
    """`train unet` on `THREE` with a `Pixelwise` network: objective, levels, noise and loss are the real ones."""

    pictures, shape = 50, (2, 8, 8)

    def __init__(self, config: TrainUnetConfig) -> None:
        self.config = config
        self.encoded = Latents()  # type: ignore[assignment]
        self.scheduler = schedulers.new(config.objective)
        if config.zero_terminal_snr:
            self.scheduler = schedulers.with_zero_terminal_snr(self.scheduler)
        self.objective = schedulers.objective_of(self.scheduler)
        self.levels = config.levels or usual_levels(self.objective)
        self.betas = self.scheduler.betas
        self.network = self.unet = Pixelwise()
        self.parents = {"data": "0" * 64}
        self.facts: dict[str, Any] = {}
        self.rates: dict[str, float] = {}
        self.stream = Stream(self.pictures, config.seed, self._example)
        places = self.pictures * self.shape[1] * self.shape[2]
        modes = torch.arange(3).repeat_interleave((THREE.shares * places).round().long())  # (places,)
        shuffled = modes[torch.randperm(places, generator=torch.Generator().manual_seed(0))]
        self.modes = shuffled.reshape(self.pictures, *self.shape[1:])  # (P, h, w)

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        mean = THREE.modes[self.modes[index]].movedim(-1, 0)  # (C, h, w)
        return {
            "moments": torch.cat([mean, torch.full_like(mean, 2 * math.log(THREE.std))]),
            "states": torch.zeros(1, 1),
            "t": np.float32(draw_t(self.levels, rng)),
            "noise": draw_noise(self.shape, rng, self.config.noise_offset),
            "draw": draw_noise(self.shape, rng),
        }

    def first(self, count: int) -> dict[str, Tensor]:
        """The first examples as a batch."""
        (batch,) = self.stream.batches(0, count, count)
        return batch

    def validate(self, samples: Path) -> dict[str, float]:
        """The error on a few examples."""
        return {"loss": self._answer(self.network, self.first(64))[0].mean().item()}

    def save(self, folder: Path) -> None:
        """Write the weights."""
        save_file({name: t.contiguous() for name, t in self.network.state_dict().items()}, folder / "net.safetensors")


class Masked(Toy):
    """The same with the third mode masked out wherever it is."""

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        mask = (self.modes[index] != 2).float()[None]  # (1, h, w)
        return {**super()._example(index, rng), "mask": mask}


def result(run: Path) -> Pixelwise:
    """The network that a run of `Toy` left."""
    network = Pixelwise()
    network.load_state_dict(load_file(run / "model" / "net.safetensors"))
    return network.eval()
