"""What U-Nets are trained on: a run of `limner encode`, and how its examples, streams and samples are made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from limner.artifacts import identity, read_json
from limner.config import TrainConfig
from limner.data.latents import LatentCache, settings_of
from limner.data.pictures import may_flip, save_grid
from limner.diffusion.objectives import draw_noise
from limner.errors import ConfigError, DataError, ModelError
from limner.generation.engine import denoise, encode_prompts, initial_noise
from limner.models import adapter as adapters
from limner.models import loading
from limner.models import vae as vaes
from limner.training.stream import Example, Stream

log = logging.getLogger(__name__)

SHOWN = 8  # val captions that are drawn, beside the sample prompts
AT_ONCE = 16  # pictures
BF16 = 2.0**-7  # what storing a weight in bf16 may change it by, as a share


class Encoded:
    """A run of `limner encode`, its train and its val pictures."""

    def __init__(
        self, folder: Path, sample_prompts: Sequence[str], *, aligned: bool = False, at_once: int = AT_ONCE
    ) -> None:
        """`sample_prompts` are drawn beside val captions; `aligned` examples have features of their views.

        At most `at_once` pictures are judged or drawn at a time.

        Raises DataError where it can't be trained on.
        """
        self.folder = folder
        self.aligned = aligned
        self.at_once = min(at_once, AT_ONCE)
        self.train, self.val = LatentCache(folder, "train"), LatentCache(folder, "val")
        if not len(self.val):
            raise DataError(f"{folder} has no pictures in its val split; encode a dataset with some.")
        # Also the VAE and the text encoder that samples are drawn with
        self.settings = settings_of(folder)
        self.vae_config = loading.read_config(loading.component(self.settings.vae, "vae") / "config.json")
        self.prompt_states, self.empty = self._prompt_states(sample_prompts)  # (P, L, D), (1, L, D)
        side = self.settings.size // vaes.factor(self.vae_config)
        self.shape = (len(self.train.view(0, 0)) // 2, side, side)  # of what is drawn
        manifest = read_json(folder / "manifest.json")
        # For the manifest of a training: which text encoder its U-Net reads, and of which VAE its latents are
        self.facts: dict[str, Any] = {"text": manifest.get("text"), "vae": manifest["parents"]["vae"]}
        self.identity = identity(folder / "cache", "*")

    def _prompt_states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        states = [self.val.states(index, 0) for index in self.val.captioned(SHOWN)]
        if prompts:
            own = encode_prompts(*loading.load_text_encoder(self.settings.clip), prompts)
            if (adapter := adapters.find(self.settings.clip)) is not None:
                own = own @ adapters.load(adapter, own.shape[-1]).T
            states = [*own[:, : self.val.states(0, None).shape[0]], *states]
        empty = self.val.states(0, None)
        return torch.stack(states or [empty]), empty[None]

    def refuse_misfit(self, unet: Any, model: str) -> None:
        """Raise ModelError where the U-Net of `model` takes other latents or token states."""
        for what, wanted, given in (
            ("latents of {} channels", unet.config["in_channels"], self.shape[0]),
            ("token states of width {}", unet.config["cross_attention_dim"], self.empty.shape[-1]),
        ):
            if wanted != given:
                raise ModelError(
                    f"The U-Net of {model} wants {what.format(wanted)}, and {self.folder} has {given}; "
                    "encode with the VAE and CLIP that it was trained with."
                )

    def refuse_other_vae(self, model: str) -> None:
        """Raise ModelError where the VAE of `model` makes other latents than the cache has, but for its precision.

        Or where it is a run that was trained on latents of another. For trainings after which the model goes on drawing
        latents for its own.
        """
        root = loading.resolve(model)
        if "vae" not in loading.parts_in(root):
            manifest = root / "manifest.json"
            known = loading.read_config(manifest).get("vae") if manifest.is_file() else None
            if known not in (None, self.facts["vae"]):
                raise ModelError(
                    f"{self.folder} has latents of the VAE {self.settings.vae}, and {model} was trained on latents of "
                    "another; encode with that one."
                )
            return
        if not _alike(loading.load_vae(self.settings.vae), loading.load_vae(model), but=vaes.DECODING):
            raise ModelError(
                f"{self.folder} has latents of the VAE {self.settings.vae}, and {model} has another; encode with "
                f"--vae {model}."
            )

    def refuse_other_text_encoder(self, model: str) -> None:
        """Raise ModelError where `model` has another text encoder than the cache is of, whatever its precision.

        As it has where the cache's states went through an adapter, which is a part of a U-Net in a model.
        """
        if "text_encoder" not in loading.parts_in(loading.resolve(model)):
            return
        both = (self.settings.clip, model)
        if adapters.find(self.settings.clip) or not _alike(*(loading.load_text_encoder(ref)[0] for ref in both)):
            raise ModelError(
                f"{self.folder} has token states of {self.settings.clip}, and {model} reads those of another text "
                f"encoder; encode with --clip {model}."
            )

    def stream(self, config: TrainConfig, example: Callable[[int, np.random.Generator], Example]) -> Stream:
        """The stream of train examples. Raises ConfigError where the pictures of no bucket make up a batch."""
        length, seed, size = len(self.train), config.seed, config.batch_size
        if not self.settings.buckets:
            return Stream(length, seed, example)
        stream = Stream(length, seed, example, multiple=size, groups=self.train.bucket)
        if not stream.epoch:
            raise ConfigError(
                f"batch_size {size} is more than the {stream.largest} pictures of the largest bucket of "
                f"{self.folder}; lower it, as a batch has pictures of one bucket."
            )
        counts = np.bincount(self.train.bucket)
        if few := counts[counts < size].sum():
            log.warning("%d pictures are in buckets of less than a batch of %d, and are not trained on.", few, size)
        return stream

    def example(self, index: int, rng: np.random.Generator, *, dropout: float) -> Example:
        """A view of a train picture and one of its captions, or for a share `dropout` of the draws none.

        `moments` (2C, h, w), `states` (L, D), `mask` (1, h, w) where there is one, `features` (W, s, s) when aligned.
        """
        captions = self.train.captions[index]
        dropped = not captions or rng.random() < dropout
        caption = None if dropped else int(rng.integers(len(captions)))
        flips = self.settings.flips
        mirrored = flips and rng.random() < 0.5 and (caption is None or may_flip(captions[caption]))
        view = int(rng.integers(self.settings.views)) * (1 + flips) + mirrored
        seen = self.train.shown(index, view) | ({"features": self.train.features(index, view)} if self.aligned else {})
        return {**seen, "states": self.train.states(index, caption)}

    def latent_shape(self, moments: Tensor) -> tuple[int, ...]:
        """Of the latents that moments (…, 2C, h, w) describe."""
        *batch, _, height, width = moments.shape
        return *batch, self.shape[0], height, width

    def latents(self, batch: dict[str, Tensor]) -> Tensor:
        """Latents of a batch with `moments` (N, 2C, h, w) and `draw` (N, C, h, w) -> (N, C, h, w)."""
        return vaes.to_latents(self.vae_config, vaes.sample(batch["moments"], batch["draw"]))

    def judged(self, most: int) -> Iterator[dict[str, Tensor]]:
        """The first val pictures, each with noise of its own, in batches of one bucket; examples but for their view."""
        buckets = self.val.bucket[:most]
        for bucket in np.unique(buckets):
            indices = np.flatnonzero(buckets == bucket).tolist()
            for start in range(0, len(indices), self.at_once):
                yield default_collate([self._judged(index) for index in indices[start : start + self.at_once]])

    def _judged(self, index: int) -> Example:
        seen, rng = self.val.shown(index, 0), np.random.default_rng(index)
        noise, draw = (draw_noise(self.latent_shape(seen["moments"]), rng) for _ in range(2))
        return {
            **seen,
            "states": self.val.states(index, 0 if self.val.captions[index] else None),
            "noise": noise,
            "draw": draw,
        }

    def draw(self, unet: Any, scheduler: Any, states: Tensor, *, steps: int, guidance: float) -> Tensor:
        """Latents for each of token states (N, L, D), with a seed of its own -> (N, C, h, w)."""
        device = next(unet.parameters()).device
        noise = initial_noise(range(len(states)), self.shape)
        latents = []
        for some, own in zip(noise.split(self.at_once), states.to(device).split(self.at_once)):
            empty = self.empty.to(device).expand_as(own)
            drawn = denoise(
                unet, scheduler, some.to(device), own, steps=steps, guidance=guidance, negative_states=empty
            )
            latents.append(drawn)
        return torch.cat(latents)

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> pixels (N, 3, H, W), about [-1, 1]."""
        vae = loading.load_vae(self.settings.vae).to(latents.device)  # read for this, and not held while training
        return torch.cat([vaes.decode(vae, some) for some in latents.split(self.at_once)])

    def save_samples(self, path: Path, unet: Any, scheduler: Any, *, steps: int, guidance: float) -> None:
        """Draw the sample prompts and val captions, each with a seed of its own, in one picture."""
        latents = self.draw(unet, scheduler, self.prompt_states, steps=steps, guidance=guidance)
        save_grid(self.decoded(latents), path, columns=4)


def _alike(one: Any, other: Any, but: Sequence[str] = ()) -> bool:
    """Whether two networks have the same weights outside these parts, but for what storing them in bf16 changes."""
    ours, its = (
        {name: weight for name, weight in network.state_dict().items() if name.split(".")[0] not in but}
        for network in (one, other)
    )
    return ours.keys() == its.keys() and all(
        ours[name].shape == its[name].shape and torch.allclose(ours[name], its[name], rtol=BF16, atol=1e-6)
        for name in ours
    )
