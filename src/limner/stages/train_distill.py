"""`limner train distill`: a student that draws in a few steps of one pass each, with guidance folded in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limner.config import TrainDistillConfig
from limner.diffusion import distillation, objectives, schedulers
from limner.diffusion.distillation import Grid
from limner.diffusion.guidance import embedding, guided, is_folded
from limner.generation.engine import denoise
from limner.models import loading, unet
from limner.training.encoded import Encoded
from limner.training.loop import plan_training, run_training
from limner.training.stream import Example

JUDGED = 32  # val pictures from whose captions student and teacher both draw
GUIDANCE = 4.0  # of validation, or what is nearest of what the student learns
CAPTIONLESS = 0.05  # share of the images that are shown with the empty prompt


def run(config: TrainDistillConfig) -> Path:
    """Train, or go on where the run stopped. -> the run folder, with `model/unet` and `model/scheduler`.

    Raises DataError, ModelError, ConfigError or RunError in one sentence.
    """
    return run_training(TrainDistill, config)


def plan(config: TrainDistillConfig) -> dict[str, Any]:
    """What `run` would do; a few steps are timed, nothing is written."""
    return plan_training(TrainDistill, config)


class TrainDistill:
    """The task: to land in one step where the guided teacher lands in `substeps`.

    Progressive distillation (Salimans and Ho 2202.00512, algorithm 2) straight to the steps that are wanted, with the
    guidance scale as an input (Meng et al. 2210.03142, section 3.1). It works for eps, v and flow alike.
    """

    def __init__(self, config: TrainDistillConfig) -> None:
        """Raises ConfigError, DataError or ModelError."""
        self.config = config
        self.encoded = Encoded(config.data, config.sample_prompts, at_once=config.held)
        self.teacher = loading.load_unet(config.model).requires_grad_(False).eval()
        self.encoded.refuse_misfit(self.teacher, config.model)
        self.encoded.refuse_other_vae(config.model)
        self.encoded.refuse_other_text_encoder(config.model)
        given = loading.load_scheduler(config.model)
        self.objective = schedulers.objective_of(given)
        self.scheduler = schedulers.for_few_steps(given)
        self.grid = Grid.of(self.scheduler, self.objective, config.steps, config.substeps)
        self.network: Any = unet.with_guidance(self.teacher)
        self.width = int(self.network.config["time_cond_proj_dim"])
        self.parents = {"data": self.encoded.identity, "model": loading.identity(config.model, "unet")}
        self.facts = self.encoded.facts
        self.rates: dict[str, float] = {}
        self.stream = self.encoded.stream(config, self._example)

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        seen = self.encoded.example(index, rng, dropout=CAPTIONLESS)
        shape = self.encoded.latent_shape(seen["moments"])
        return {
            **seen,
            "step": int(rng.integers(self.config.steps)),
            "guidance": np.float32(rng.uniform(*self.config.guidance)),
            "noise": objectives.draw_noise(shape, rng),
            "draw": objectives.draw_noise(shape, rng),
        }

    @torch.no_grad()
    def _landed(self, noised: Tensor, places: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Where the teacher goes from noised latents at places (N,) of the grid in `substeps` -> (N, C, h, w)."""
        teacher, states, guidance = self.teacher.to(noised.device), batch["states"], batch["guidance"]
        folded = is_folded(teacher)  # which makes it a student itself
        empty = self.encoded.empty.to(states).expand_as(states)
        both = torch.cat([empty, states])  # (2N, L, D)

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            if folded:
                return self._predicted(teacher, latents, timesteps, batch)
            return guided(teacher, latents, timesteps, both, guidance[:, None, None, None]).float()

        return self.grid.descend(self.objective, noised, places, predict, in_pairs=not folded)

    def _predicted(self, network: Any, noised: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """One pass of a U-Net that guidance is folded into -> (N, C, h, w)."""
        scale = embedding(batch["guidance"], self.width)
        states = batch["states"]
        predicted = network(noised, timesteps, encoder_hidden_states=states, timestep_cond=scale, return_dict=False)
        answer: Tensor = predicted[0].float()
        return answer

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of x0, weighted by level (Salimans and Ho, section 4), where a mask lets in."""
        places = batch["step"] * self.config.substeps
        here, there = self.grid.level(places), self.grid.level(places + self.config.substeps)
        noised = objectives.add_noise(self.encoded.latents(batch), batch["noise"], *here)
        wanted = distillation.landing(noised, self._landed(noised, places, batch), here, there)
        predicted = self._predicted(network, noised, self.grid.timesteps.to(places.device)[places], batch)
        x0 = distillation.data_of(self.objective, predicted, noised, here)
        errors = distillation.weight(here) * (x0 - wanted).square()
        return objectives.mean_error(errors, batch.get("mask")).mean(), {}

    def validate(self, samples: Path) -> dict[str, float]:
        """How far what the student draws is from what the teacher draws of the same noise; draws pictures.

        `loss` is the mean squared distance of the latents as a share of the teacher's variance.
        """
        device = next(self.network.parameters()).device
        low, high = self.config.guidance
        scale = min(max(GUIDANCE, low), high)
        student: list[Tensor] = []
        teacher: list[Tensor] = []
        for batch in self.encoded.judged(JUDGED):
            here = {name: value.to(device) for name, value in batch.items()}
            noise, states = here["noise"], here["states"]
            here["guidance"] = torch.full([len(noise)], scale, device=device)
            drawn = denoise(self.network, self.scheduler, noise, states, steps=self.config.steps, guidance=scale)
            wanted, places = noise, torch.zeros(len(noise), dtype=torch.long, device=device)
            for _ in range(self.config.steps):
                wanted = self._landed(wanted, places, here)
                places = places + self.config.substeps
            student.append(drawn.flatten())  # since buckets differ in shape
            teacher.append(wanted.flatten())
        self.encoded.save_samples(
            samples / "drawn.png", self.network, self.scheduler, steps=self.config.steps, guidance=scale
        )
        own, other = torch.cat(student), torch.cat(teacher)
        return {"loss": ((own - other).square().mean() / other.var(correction=0)).item()}

    def save(self, folder: Path) -> None:
        """Write `folder/unet` and `folder/scheduler`."""
        self.network.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
