"""`limner train unet`: the network that turns noise into latents under the token states of a caption.

`limner train lora` is the same training, of low-rank additions to such a network.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limner.config import TrainLoraConfig, TrainUnetConfig
from limner.data.dataset import read_split
from limner.data.latents import LatentCache
from limner.diffusion import objectives, schedulers
from limner.diffusion.guidance import is_folded
from limner.errors import ConfigError, DataError, ModelError
from limner.evaluation.extractors import features_of
from limner.evaluation.watch import Watch
from limner.evaluation.yardstick import Yardstick
from limner.models import adapter as adapters
from limner.models import gate, layers, loading, lora, unet
from limner.models.representation import Aligned, misaligned
from limner.training.copied import Shown
from limner.training.encoded import Encoded
from limner.training.loop import plan_training, run_training
from limner.training.stream import Example
from limner.training.task import refuse_other_settings

JUDGED = 256  # val pictures for the validation loss
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which each of them is judged
STEPS, GUIDANCE = 20, 4.0  # of samples
ASKED = 16  # train captions that are drawn, to find copies of their pictures


def run(config: TrainUnetConfig) -> Path:
    """Train, or go on where the run stopped. -> the run folder, with `model/unet` and `model/scheduler`, or a LoRA.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    return run_training(TrainUnet, config)


def plan(config: TrainUnetConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    return plan_training(TrainUnet, config)


class TrainUnet:
    """The task: predict data, noise or what lies between, from noised latents and token states."""

    def __init__(self, config: TrainUnetConfig) -> None:
        """Raises ConfigError, DataError or ModelError."""
        self.config = config
        aligned = config.align_weight > 0
        self.encoded = Encoded(config.data, config.sample_prompts, aligned=aligned, at_once=config.held)
        self.parents = {"data": self.encoded.identity}
        if config.model is None:
            channels, side, _ = self.encoded.shape
            width = self.encoded.empty.shape[-1]
            self.scheduler = schedulers.new(config.objective)
            self.unet = unet.new(config, side=side, latent_channels=channels, state_width=width)
        else:
            self.scheduler = loading.load_scheduler(config.model)
            self.unet = loading.load_unet(config.model)
            self.parents["model"] = loading.identity(config.model, "unet")
            own = {"objective": schedulers.objective_of(self.scheduler), **unet.settings_of(self.unet)}
            refuse_other_settings(config, own, "U-Net")
            if is_folded(self.unet):  # whose guidance scale is an input that distillation alone gives
                raise ConfigError(f"{config.model} is a student of limner train distill; train its teacher instead.")
            self.encoded.refuse_misfit(self.unet, config.model)
            if isinstance(config, TrainLoraConfig) or config.tune != "full":  # else it may get used to other latents
                self.encoded.refuse_other_vae(config.model)
            if isinstance(config, TrainLoraConfig):
                self._refuse_other_text(config.model)
                lora.add(self.unet, config)
            else:
                layers.freeze_others(self.unet, config.tune)
        layers.drop_out(self.unet, config.dropout)
        if config.precision == "bf16" and not torch.cuda.is_available():
            layers.attend_plainly(self.unet)
        self.network: nn.Module = self.unet
        if config.align_weight:
            width, side, _ = self.encoded.train.features(0, 0).shape
            self.network = Aligned(self.unet, width, side)
        if config.zero_terminal_snr:
            self.scheduler = schedulers.with_zero_terminal_snr(self.scheduler)
        self.objective = schedulers.objective_of(self.scheduler)
        self.levels = config.levels or objectives.usual_levels(self.objective)
        self.betas = getattr(self.scheduler, "betas", None)
        self.facts = self.encoded.facts
        self.rates: dict[str, float] = {}
        self.stream = self.encoded.stream(config, self._example)
        self.judge = None if config.judge is None else self._find_judge(config.judge)

    def _find_judge(self, ref: str) -> Yardstick:
        """Raises ConfigError where the judge is the CLIP that is trained on, DataError where val has no captions."""
        judge = Yardstick.find(ref)
        if judge.conditions(self.encoded.settings.clip):
            raise ConfigError(
                "The judge is the very CLIP whose token states are trained on, which flatters what is drawn; name "
                "another --judge."
            )
        read_split(self.encoded.settings.data, "val")
        if not self.encoded.val.captioned(1):
            raise DataError(f"No val picture of {self.config.data} has a caption to draw for the judge; leave it out.")
        return judge

    def _refuse_other_text(self, model: str) -> None:
        """Raise ModelError where a LoRA's model, which goes on reading its own text encoder, reads another one.

        Or where states went through an adapter, which changes weights that a LoRA is added to.
        """
        if adapters.find(self.encoded.settings.clip):
            raise ModelError(
                f"{self.config.data} has token states that went through the adapter of {self.encoded.settings.clip}, "
                f"and no LoRA reads such; encode with --clip {model}."
            )
        text = gate.TextFacts(**(self.encoded.facts["text"] or {}))
        gate.check(text, gate.wanted(model), clip=self.encoded.settings.clip, unet=model)

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        seen = self.encoded.example(index, rng, dropout=self.config.caption_dropout)
        shape = self.encoded.latent_shape(seen["moments"])
        return {
            **seen,
            "t": np.float32(objectives.draw_t(self.levels, rng)),
            "noise": objectives.draw_noise(shape, rng, self.config.noise_offset),
            "draw": objectives.draw_noise(shape, rng),
            **({"dropped": int(rng.integers(2**62))} if self.config.dropout else {}),
        }

    def _answer(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Mean squared error of each picture's prediction, where its mask, if it has one, lets in -> (N,).

        Beside it what an `Aligned` network makes of the features (N, W, s, s).
        """
        x0 = self.encoded.latents(batch)
        alpha, sigma = self._level(batch["t"])
        noised = objectives.add_noise(x0, batch["noise"], alpha, sigma)
        step = objectives.timestep(self.objective, batch["t"])
        if "dropped" in batch:
            layers.drop_by(network, batch["dropped"])
        predicted, *mapped = network(noised, step, encoder_hidden_states=batch["states"], return_dict=False)
        wanted = objectives.target(self.objective, x0, batch["noise"], alpha, sigma)
        return objectives.mean_error((predicted.float() - wanted).square(), batch.get("mask")), *mapped

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (N,) -> (N, 1, 1, 1) each."""
        betas = None if self.betas is None else self.betas.to(t.device)
        return objectives.level(self.objective, t, betas)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction, weighted by level where `min_snr` is set; and alignment."""
        errors, *mapped = self._answer(network, batch)  # (N,)
        figures = {"error": errors.mean()}
        total = figures["error"]
        if self.config.min_snr is not None:
            total = (errors * objectives.min_snr(self.objective, *self._level(batch["t"]), self.config.min_snr)).mean()
        if mapped:
            figures["misaligned"] = misaligned(mapped[0], batch["features"]).mean()
            total = total + self.config.align_weight * figures["misaligned"]
        return total, figures

    def validate(self, samples: Path) -> dict[str, float]:
        """The loss on fixed val pictures, noise and levels, by level and unweighted; draws pictures."""
        device = next(self.network.parameters()).device
        sums = dict.fromkeys(LEVELS, 0.0)
        count = 0
        for fixed in self.encoded.judged(JUDGED):
            here = {name: value.to(device) for name, value in fixed.items()}
            size = len(here["states"])
            count += size
            for t in LEVELS:
                errors, *_ = self._answer(self.unet, {**here, "t": torch.full([size], t, device=device)})
                sums[t] += errors.sum().item()
        figures = {f"loss_at_{t}": total / count for t, total in sums.items()}
        figures = {"loss": sum(figures.values()) / len(figures), **figures}
        self.encoded.save_samples(samples / "drawn.png", self.unet, self.scheduler, steps=STEPS, guidance=GUIDANCE)
        figures["copies"] = self.shown.share_of(self._drawn(self.encoded.train, ASKED))
        if self.judge is None:
            return figures
        drawn = self._drawn(self.encoded.val, self.config.judged_pictures)
        return figures | self.watch.score(self.encoded.decoded(drawn))

    @functools.cached_property
    def shown(self) -> Shown:
        """What copies are looked for in."""
        return Shown(self.encoded)

    @functools.cached_property
    def watch(self) -> Watch:
        """What scores pictures of the first val captions, beside all val photographs."""
        assert self.judge is not None
        photographs = [record.path for record in read_split(self.encoded.settings.data, "val")]
        seen = features_of(self.judge.extractor, photographs, cache=self.config.out / "features")
        first = [captions[0] for captions in self.encoded.val.captions if captions]
        return Watch(self.judge, first[: self.config.judged_pictures], self.judge.embed(seen), first)

    def _drawn(self, cache: LatentCache, most: int) -> Tensor:
        """Latents for the captions of the first pictures of a split (N, C, h, w)."""
        states = torch.stack([cache.states(index, 0) for index in cache.captioned(most)])
        with torch.autocast(self.unet.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.encoded.draw(self.unet, self.scheduler, states, steps=STEPS, guidance=GUIDANCE)

    def save(self, folder: Path) -> None:
        """Write `folder/unet` and `folder/scheduler`, or the files of a LoRA."""
        if isinstance(self.config, TrainLoraConfig):
            about = {"base_model": self.config.model, "base_model_sha256": self.parents["model"]}
            lora.save(self.unet, folder, about)
            return
        self.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
