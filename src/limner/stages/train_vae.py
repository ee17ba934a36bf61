"""`limner train vae`: the autoencoder that turns pixels into latents and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from limner.config import TrainVaeConfig
from limner.data.dataset import read_training_split, read_validation_split, split_identity
from limner.data.pictures import load_crop, load_pixels, save_grid
from limner.errors import ConfigError
from limner.models import loading
from limner.models import vae as vaes
from limner.models.critic import Critic, contest, turned
from limner.models.perceptual import PerceptualDistance
from limner.training.loop import plan_training, run_training
from limner.training.stream import Example, Stream
from limner.training.task import refuse_other_settings

MIN_SCALE = 0.5  # smallest share of a picture that a crop takes
SHRUNK = (1, 2, 4)  # by how much latents are shrunk for `equivariance`
JUDGED, SHOWN = 256, 8  # val pictures for the figures, and for the samples
MEASURED = 1024  # train pictures from which the latents' mean and deviation are taken


def run(config: TrainVaeConfig) -> Path:
    """Train, or go on where the run stopped. -> the run folder, with the VAE in `model/vae`.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    return run_training(TrainVae, config)


def plan(config: TrainVaeConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    return plan_training(TrainVae, config)


class Autoencoder(nn.Module):
    """Pixels there and back in one forward, and what a critic says of them."""

    def __init__(self, vae: Any, critic: Critic | None) -> None:
        super().__init__()
        self.vae = vae
        self.critic = critic

    def forward(self, pixels: Tensor, noise: Tensor, turns: Tensor, shrink: Tensor) -> Seen:
        """pixels (N, 3, S, S), noise (N, C, s, s), quarter turns (N,), divisors of the side (N,).

        Latents are turned and shrunk, and what they decode to is to be the pixels turned and shrunk alike.
        """
        moments = vaes.encode(self.vae, pixels)
        latents, wanted = (turned(x, turns) for x in (vaes.sample(moments, noise), pixels))
        pairs: list[tuple[Tensor, Tensor]] = []
        for divisor in sorted(set(shrink.tolist())):
            small, target = (avg_pool2d(x[shrink == divisor], divisor) for x in (latents, wanted))
            pairs.append((self.vae.decode(small, return_dict=False)[0].float(), target))
        contested = None if self.critic is None else self._contested(self.critic, pairs)
        return Seen(pairs, moments.float(), contested)

    @staticmethod
    def _contested(critic: Critic, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Both losses of `contest`, each the mean over all pictures, so that a batch may come in parts."""
        each = [torch.stack(contest(critic, target, again)) * len(again) for again, target in pairs]  # (2,) each
        learned, drawn = torch.stack(each).sum(dim=0) / sum(len(again) for again, _ in pairs)
        return learned, drawn


@dataclass(frozen=True)
class Seen:
    """What came of a batch of pictures."""

    pairs: list[tuple[Tensor, Tensor]]
    """Reconstructions and what they should be, (n, 3, H, W) twice, in one size each."""
    moments: Tensor
    """(N, 2C, h, w)."""
    contested: tuple[Tensor, Tensor] | None
    """The critic's loss, and the one that it puts on the reconstructions, where there is a critic."""


def weave(difference: Tensor, factor: int) -> Tensor:
    """Mean square of what is missed alike at the same place of every latent, which is `factor` pixels wide.

    (N, C, H, W) -> scalar. Nothing of a photograph repeats in that step. What a decoder's upsampling makes does (Odena
    et al., Deconvolution and checkerboard artifacts, 2016), and a perceptual distance may reward it as texture.
    """
    places = difference.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean(dim=(2, 4))  # (N, C, f, f)
    return (places - places.mean(dim=(2, 3), keepdim=True)).square().mean()


class TrainVae:
    """The task: L1, L2, weave and perceptual distance of reconstructions, a critic's doubt, the moments' divergence."""

    def __init__(self, config: TrainVaeConfig) -> None:
        """Raises DataError, ModelError or ConfigError."""
        self.config = config
        self.train = read_training_split(config.data, captioned=False)
        self.val = read_validation_split(config.data)[:JUDGED]
        self.parents = {"data": split_identity(config.data, "train")}
        if config.model is None:
            self.vae = vaes.new(config.channels, config.layers, config.latent_channels)
        else:
            self.vae = loading.load_vae(config.model)
            self.parents["model"] = loading.identity(config.model, "vae")
            refuse_other_settings(config, vaes.settings_of(self.vae.config), "VAE")
        if config.tune == "decoder":
            vaes.freeze_encoder(self.vae)
        self.factor = vaes.factor(self.vae.config)
        step = self.factor * (max(SHRUNK) if config.equivariance else 1)
        if config.size % step:
            shrunk = f" times {max(SHRUNK)}, by which equivariance shrinks latents" if config.equivariance else ""
            raise ConfigError(f"--size {config.size} is not divisible by the VAE's factor {self.factor}{shrunk}.")
        self.network: nn.Module = Autoencoder(self.vae, Critic() if config.adversarial_weight else None)
        self.perceptual = PerceptualDistance() if config.perceptual_weight else None
        self.facts: dict[str, Any] = {}
        self.rates: dict[str, float] = {}
        self.stream = Stream(len(self.train), config.seed, self._example)

    def _noise(self, rng: np.random.Generator) -> Tensor:
        side = self.config.size // self.factor
        shape = (self.vae.config["latent_channels"], side, side)
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        pixels = load_crop(self.train[index].path, self.config.size, rng, min_scale=MIN_SCALE, flip=True)
        moved = rng.random() < self.config.equivariance
        return {
            "pixels": pixels,
            "noise": self._noise(rng),
            "turns": int(rng.integers(4)) if moved else 0,
            "shrink": int(rng.choice(SHRUNK)) if moved else 1,
        }

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Kingma and Welling 2013, equation 10, with a likelihood that LPIPS-like features and a critic sharpen.

        With `equivariance` for a share of the pictures after a turn and a shrinking of their latents: EQ-VAE
        (Kouzelis et al. 2502.09509, equation 5), which makes latents simpler to draw.
        """
        config = self.config
        seen: Seen = network(batch["pixels"], batch["noise"], batch["turns"], batch["shrink"])
        figures: dict[str, Tensor] = {}
        for again, wanted in seen.pairs:
            share = len(again) / len(batch["pixels"])
            for name, value in self._distances(again, wanted).items():
                figures[name] = figures.get(name, 0) + share * value
        mean, logvar = seen.moments.chunk(2, dim=1)
        figures["kl"] = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        figures["error"] = self._weighed(figures)
        total = figures["error"] + config.kl_weight * figures["kl"]
        if seen.contested is not None:
            figures["critic"], figures["adversarial"] = seen.contested
            total = total + figures["critic"] + config.adversarial_weight * figures["adversarial"]
        return total, figures

    def _distances(self, again: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        difference = again - pixels
        l1, l2 = difference.abs().mean(), difference.square().mean()
        figures = {"l1": l1, "l2": l2, "weave": weave(difference, self.factor)}
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual.to(pixels.device)(again, pixels)
        return figures

    def _weighed(self, distances: dict[str, Any]) -> Any:
        """The distances in one, as training and validation both count them."""
        config, perceptual = self.config, distances.get("perceptual", 0.0)
        exact = distances["l1"] + config.l2_weight * distances["l2"] + config.weave_weight * distances["weave"]
        return exact + config.perceptual_weight * perceptual

    def validate(self, samples: Path) -> dict[str, float]:
        """L1, PSNR in dB, weave and perceptual distance on val pictures; draws some above their reconstructions."""
        device = next(self.network.parameters()).device
        sums: dict[str, float] = {}
        shown: list[Tensor] = []
        for start in range(0, len(self.val), self.config.held):
            records = self.val[start : start + self.config.held]
            pixels = torch.stack([load_pixels(r.path, self.config.size) for r in records]).to(device)
            moments = vaes.encode(self.vae, pixels)
            again = self.vae.decode(moments.chunk(2, dim=1)[0], return_dict=False)[0].clamp(-1, 1)
            figures = self._distances(again, pixels)
            squared = (again - pixels).square().mean(dim=(1, 2, 3))  # (N,)
            figures["psnr"] = (10 * torch.log10(4 / squared)).mean()  # the range of pixels is 2
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(records)
            if start < SHOWN:
                shown.append(torch.stack([pixels, again]))  # (2, n, 3, H, W)
        pairs = torch.cat(shown, dim=1)[:, :SHOWN]
        save_grid(pairs.flatten(0, 1), samples / "reconstructions.png", columns=pairs.shape[1])
        means = {name: value / len(self.val) for name, value in sums.items()}
        return {"loss": self._weighed(means), **means}

    def save(self, folder: Path) -> None:
        """Write `folder/vae`; a new one's latents are brought to zero mean and unit deviation.

        One that was given keeps its scale, which U-Nets know it by.
        """
        vae = copy.deepcopy(self.vae)
        if self.config.model is None:
            vaes.standardise(vae, *self._latent_statistics())
        vae.save_pretrained(folder / "vae")

    @torch.no_grad()
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of sampled latents over train pictures -> (C,) each."""
        device = next(self.network.parameters()).device
        rng = np.random.default_rng(self.config.seed)
        drawn = []
        records = self.train[:MEASURED]
        for start in range(0, len(records), self.config.held):
            batch = records[start : start + self.config.held]
            pixels = torch.stack([load_pixels(r.path, self.config.size) for r in batch]).to(device)
            noise = torch.stack([self._noise(rng) for _ in batch]).to(device)
            drawn.append(vaes.sample(vaes.encode(self.vae, pixels), noise))
        latents = torch.cat(drawn)  # (N, C, h, w)
        return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
