"""`limner train unet`: the network that turns noise into latents under the token states of a caption.

`limner train lora` is the same training, of low-rank additions to such a network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from limner.artifacts import identity, read_json, write_json
from limner.config import EncodeConfig, TrainLoraConfig, TrainUnetConfig
from limner.data.latents import LatentCache, dataset_parents
from limner.data.pictures import may_flip, save_grid
from limner.diffusion import objectives, schedulers
from limner.errors import ConfigError, DataError, ModelError
from limner.generation.engine import denoise, encode_prompts, initial_noise
from limner.models import gate, layers, loading, lora, unet
from limner.models import vae as vaes
from limner.training.loop import plan_training, run_training
from limner.training.stream import Example, Stream

log = logging.getLogger(__name__)

JUDGED = 256  # val pictures for the validation loss
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which each of them is judged
SHOWN = 8  # val captions that are drawn, beside the sample prompts
STEPS, GUIDANCE = 20, 4.0  # of samples


def run(config: TrainUnetConfig) -> Path:
    """Train, or go on where the run stopped. -> the run folder, with `model/unet` and `model/scheduler`, or a LoRA.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    folder = run_training(TrainUnet, config)
    # What text encoder the U-Net was trained on, which `assemble` asks
    text, manifest = read_json(config.data / "manifest.json").get("text"), read_json(folder / "manifest.json")
    if "finished" in manifest and manifest.get("text") != text:
        write_json(folder / "manifest.json", {**manifest, "text": text})
    return folder


def plan(config: TrainUnetConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    return plan_training(TrainUnet, config)


class TrainUnet:
    """The task: predict data, noise or what lies between, from noised latents and token states."""

    def __init__(self, config: TrainUnetConfig) -> None:
        """Raises ConfigError, DataError or ModelError."""
        self.config = config
        self.train, self.val = LatentCache(config.data, "train"), LatentCache(config.data, "val")
        if not len(self.val):
            raise DataError(f"{config.data} has no pictures in its val split; encode a dataset with some.")
        # EncodeConfig, to know the VAE and the text encoder that samples are drawn with
        self.encoded = EncodeConfig.model_validate(read_json(config.data / "config.json"))
        self._refuse_stale()
        self.vae_config = loading.read_config(loading.component(self.encoded.vae, "vae") / "config.json")
        self.prompt_states, self.empty = self._prompt_states()
        channels, side = len(self.train.view(0, 0)) // 2, self.encoded.size // vaes.factor(self.vae_config)
        self.shape = (channels, side, side)  # of what is drawn
        self.parents = {"data": identity(config.data / "cache", "*")}
        if config.model is None:
            width = self.empty.shape[-1]
            self.scheduler = schedulers.new(config.objective)
            self.network = unet.new(config, side=side, latent_channels=channels, state_width=width)
        else:
            self.scheduler = loading.load_scheduler(config.model)
            self.network = loading.load_unet(config.model)
            self.parents["model"] = loading.identity(config.model, "unet")
            self._check_fit()
            if isinstance(config, TrainLoraConfig):
                lora.add(self.network, config)
            else:
                layers.freeze_others(self.network, config.tune)
        if config.zero_terminal_snr:
            self.scheduler = schedulers.with_zero_terminal_snr(self.scheduler)
        self.objective = schedulers.objective_of(self.scheduler)
        self.betas = getattr(self.scheduler, "betas", None)
        self.rates: dict[str, float] = {}
        self.stream = self._stream()

    def _refuse_stale(self) -> None:
        """Raise DataError where what the cache was made from has changed since; the dataset may be gone."""
        encoded, parents = self.encoded, read_json(self.config.data / "manifest.json")["parents"]
        data = dataset_parents(encoded.data) if (encoded.data / "dataset.json").is_file() else parents
        encoders = {"vae": loading.identity(encoded.vae, "vae"), "clip": loading.text_identity(encoded.clip)}
        now = {**data, **encoders}
        if changed := sorted(role for role in {**parents, **now} if parents.get(role) != now.get(role)):
            named = {"vae": f"the VAE {encoded.vae}", "clip": f"the text encoder {encoded.clip}"}
            what = " and ".join(named.get(role, f"{role} of {encoded.data}") for role in changed)
            raise DataError(f"{self.config.data} is stale, as {what} changed since; encode into a new folder.")

    def _stream(self) -> Stream:
        """Raises ConfigError where the pictures of no bucket make up a batch."""
        length, seed, size = len(self.train), self.config.seed, self.config.batch_size
        if not self.encoded.buckets:
            return Stream(length, seed, self._example)
        stream = Stream(length, seed, self._example, multiple=size, groups=self.train.bucket)
        if not stream.epoch:
            raise ConfigError(
                f"batch_size {size} is more than the {stream.largest} pictures of the largest bucket of "
                f"{self.config.data}; lower it, as a batch has pictures of one bucket."
            )
        counts = np.bincount(self.train.bucket)
        if few := counts[counts < size].sum():
            log.warning("%d pictures are in buckets of less than a batch of %d, and are not trained on.", few, size)
        return stream

    def _check_fit(self) -> None:
        known, width = self.network.config, self.empty.shape[-1]
        for what, wanted, given in (
            ("latents of {} channels", known["in_channels"], self.shape[0]),
            ("token states of width {}", known["cross_attention_dim"], width),
        ):
            if wanted != given:
                raise ModelError(
                    f"The U-Net of {self.config.model} wants {what.format(wanted)}, and {self.config.data} has "
                    f"{given}; encode with the VAE and CLIP that it was trained with."
                )
        if isinstance(self.config, TrainLoraConfig):  # whose model goes on reading the text encoder that it has
            text = read_json(self.config.data / "manifest.json").get("text") or {}
            read = gate.wanted(self.config.model)
            gate.check(gate.TextFacts(**text), read, clip=self.encoded.clip, unet=self.config.model)

    def _prompt_states(self) -> tuple[Tensor, Tensor]:
        """Token states of what is drawn at each validation, and of the empty prompt -> (P, L, D), (1, L, D)."""
        captioned = [index for index, captions in enumerate(self.val.captions) if captions][:SHOWN]
        states = [self.val.states(index, 0) for index in captioned]
        if self.config.sample_prompts:
            text_encoder, tokenizer = loading.load_text_encoder(self.encoded.clip)
            own = encode_prompts(text_encoder, tokenizer, self.config.sample_prompts)
            states = [*own[:, : self.val.states(0, None).shape[0]], *states]
        empty = self.val.states(0, None)
        return torch.stack(states or [empty]), empty[None]

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        captions = self.train.captions[index]
        dropped = not captions or rng.random() < self.config.caption_dropout
        caption = None if dropped else int(rng.integers(len(captions)))
        mirrored = self.encoded.flips and rng.random() < 0.5 and (caption is None or may_flip(captions[caption]))
        view = int(rng.integers(self.encoded.views)) * (1 + self.encoded.flips) + mirrored
        seen = self.train.shown(index, view)
        shape = (self.shape[0], *seen["moments"].shape[1:])
        return {
            **seen,
            "states": self.train.states(index, caption),
            "t": np.float32(objectives.draw_t(self.config.levels, rng)),
            "noise": objectives.draw_noise(shape, rng, self.config.noise_offset),
            "draw": objectives.draw_noise(shape, rng),
        }

    def _answer(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error of each picture's prediction, where its mask, if it has one, lets in -> (N,)."""
        x0 = vaes.to_latents(self.vae_config, vaes.sample(batch["moments"], batch["draw"]))
        alpha, sigma = self._level(batch["t"])
        noised = objectives.add_noise(x0, batch["noise"], alpha, sigma)
        step = objectives.timestep(self.objective, batch["t"])
        predicted = network(noised, step, encoder_hidden_states=batch["states"], return_dict=False)[0]
        wanted = objectives.target(self.objective, x0, batch["noise"], alpha, sigma)
        return objectives.mean_error((predicted.float() - wanted).square(), batch.get("mask"))

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (N,) -> (N, 1, 1, 1) each."""
        betas = None if self.betas is None else self.betas.to(t.device)
        return objectives.level(self.objective, t, betas)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction, weighted by level where `min_snr` is set."""
        errors = self._answer(network, batch)  # (N,)
        if self.config.min_snr is not None:
            errors = errors * objectives.min_snr(self.objective, *self._level(batch["t"]), self.config.min_snr)
        return errors.mean(), {}

    def validate(self, samples: Path) -> dict[str, float]:
        """The loss on fixed val pictures, noise and levels, by level and unweighted; draws pictures."""
        device = next(self.network.parameters()).device
        rng = np.random.default_rng(self.config.seed)
        sums = dict.fromkeys(LEVELS, 0.0)
        for chosen in self._judged():
            seen = default_collate([self.val.shown(index, 0) for index in chosen])
            shape = (len(chosen), self.shape[0], *seen["moments"].shape[2:])
            noise, draw = (objectives.draw_noise(shape, rng) for _ in range(2))
            fixed = {
                **seen,
                "states": torch.stack([self.val.states(i, 0 if self.val.captions[i] else None) for i in chosen]),
                "noise": noise,
                "draw": draw,
            }
            for t in LEVELS:
                batch = {name: value.to(device) for name, value in {**fixed, "t": torch.full([len(chosen)], t)}.items()}
                sums[t] += self._answer(self.network, batch).sum().item()
        figures = {f"loss_at_{t}": total / min(len(self.val), JUDGED) for t, total in sums.items()}
        self._draw(samples / "drawn.png", device)
        return {"loss": sum(figures.values()) / len(figures), **figures}

    def _judged(self) -> Iterator[list[int]]:
        """The val pictures to be judged, in batches of one bucket."""
        buckets = self.val.bucket[:JUDGED]
        for bucket in np.unique(buckets):
            indices = np.flatnonzero(buckets == bucket).tolist()
            for start in range(0, len(indices), self.config.batch_size):
                yield indices[start : start + self.config.batch_size]

    def _draw(self, path: Path, device: torch.device) -> None:
        states = self.prompt_states.to(device)
        noise = initial_noise(range(len(states)), self.shape).to(device)
        empty = self.empty.to(device).expand_as(states)
        latents = denoise(
            self.network, self.scheduler, noise, states, steps=STEPS, guidance=GUIDANCE, negative_states=empty
        )
        vae = loading.load_vae(self.encoded.vae).to(device)  # read for this, and not held while training
        save_grid(vaes.decode(vae, latents), path, columns=4)

    def save(self, folder: Path) -> None:
        """Write `folder/unet` and `folder/scheduler`, or the files of a LoRA."""
        if isinstance(self.config, TrainLoraConfig):
            about = {"base_model": self.config.model, "base_model_sha256": self.parents["model"]}
            lora.save(self.network, folder, about)
            return
        self.network.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
