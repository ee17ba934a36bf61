"""From a prompt and a seed to a picture: the algorithm as verbs, and the `Model` that holds what they need."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Generator, Tensor

from limner.errors import ConfigError
from limner.generation import prompts as texts
from limner.generation import provenance
from limner.models import loading
from limner.models import vae as vaes

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[int, int], None]
"""Called as (done, of); an exception that it raises ends the work."""


@torch.no_grad()
def encode_prompts(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token states of prompts -> (N, L, D).

    L is 77 for CLIP. When the longest prompt needs k pieces (see `prompts.chunks`), each piece is encoded by itself
    and their states stand one behind the other, L = 77k; shorter prompts are filled up with empty pieces.
    """
    length = texts.length_of(text_encoder, tokenizer)
    cut = [texts.chunks(texts.token_ids(tokenizer, prompt), length) for prompt in prompts]
    most = max(map(len, cut))
    pieces = [piece for own in cut for piece in [*own, *[[]] * (most - len(own))]]
    rows, masks = texts.framed(pieces, tokenizer, length)
    device = text_encoder.device
    ids = torch.tensor(rows, device=device)  # (N k, 77)
    # As in Diffusers' pipeline: attention sees the padding unless the text encoder was trained otherwise.
    mask = torch.tensor(masks, device=device) if getattr(text_encoder.config, "use_attention_mask", False) else None
    states: Tensor = text_encoder(ids, attention_mask=mask)[0]  # (N k, 77, D)
    return states.reshape(len(prompts), most * length, -1)  # (N, L, D)


def generators(seeds: Sequence[int]) -> list[Generator]:
    """One source of randomness an image. They live on the CPU, so that all devices draw the same noise."""
    return [Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(seeds: Sequence[int | Generator], shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise of `shape` (C, h, w) for each seed, or from each generator, which moves on -> (N, C, h, w)."""
    sources = [seed if isinstance(seed, Generator) else generators([seed])[0] for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources])


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    states: Tensor,
    *,
    steps: int,
    guidance: float,
    negative_states: Tensor | None = None,
    generators: Sequence[Generator] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn unit noise into latents, with classifier-free guidance (Ho and Salimans 2022, equation 6).

    latents (N, C, h, w), states and negative_states (N, L, D) -> (N, C, h, w). At guidance 1 the negative states are
    not needed and each step is one pass; otherwise both passes share a batch. Schedulers that add noise of their own
    draw it from `generators`, one an image, or from torch's global generator without them. `scheduler` is left as it
    was. Raises ConfigError where the scheduler can't take that many steps.
    """
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps, device=latents.device)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"This model's {type(scheduler).__name__} can't take {steps} steps ({error}).") from None
    guided = guidance > 1
    if guided:
        assert negative_states is not None, "guidance needs negative states"
        states = torch.cat([negative_states, states])  # (2N, L, D)
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if takes_generators and generators is not None else {}

    latents = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        twice = torch.cat([latents, latents]) if guided else latents  # (2N, C, h, w)
        predicted = unet(scheduler.scale_model_input(twice, t), t, encoder_hidden_states=states, return_dict=False)[0]
        if guided:
            without, towards = predicted.chunk(2)  # (N, C, h, w) each
            predicted = without + guidance * (towards - without)
        latents = scheduler.step(predicted, t, latents, **extra, return_dict=False)[0]
        if on_step is not None:
            on_step(i + 1, len(scheduler.timesteps))
    return latents


def to_images(pixels: Tensor) -> list[Image]:
    """Pictures of pixels (N, 3, H, W) in [-1, 1]; what lies outside is clamped."""
    from PIL import Image

    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)  # (N, 3, H, W)
    bytes_ = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    return [Image.fromarray(array) for array in bytes_]


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int


@dataclass(frozen=True)
class Defaults:
    """What a model draws with when it is not told otherwise; sizes in pixels."""

    steps: int
    guidance: float
    width: int
    height: int


class Painter(Protocol):
    """What turns jobs into pictures: `LatentDiffusion`, or any other pipeline of Diffusers."""

    parts: tuple[str, ...]
    scheduler: Any
    defaults: Defaults
    multiple: int
    """Both sides of a picture are multiples of this."""
    device: torch.device

    def check(self, job: Job) -> None:
        """Raise ConfigError where the painter can't take the job."""

    def paint(self, jobs: Sequence[Job], on_step: OnStep | None) -> list[Image]:
        """Draw jobs that differ in prompt, negative prompt and seed only."""


class LatentDiffusion:
    """A CLIP text encoder, a U-Net and a VAE: Stable Diffusion 1 and 2, and what Limner trains."""

    parts = ("text_encoder", "unet", "vae")

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load from a model folder. Raises ModelError."""
        ref = str(folder)
        encoder, self.tokenizer = loading.load_text_encoder(ref)
        self.text_encoder = encoder.to(device)
        self.unet = loading.load_unet(ref).to(device)
        self.vae = loading.load_vae(ref).to(device)
        self.scheduler = loading.load_scheduler(ref)
        self.device = device
        self._as_stable_diffusion_does()
        self.factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)  # pixels a latent
        self.multiple = self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        side = self.unet.config["sample_size"]
        height, width = (side, side) if isinstance(side, int) else side
        self.defaults = Defaults(25, 7.5, width * self.factor, height * self.factor)

    def _as_stable_diffusion_does(self) -> None:
        """Diffusers' StableDiffusionPipeline overrides these two settings of any scheduler that has them."""
        settings = {"steps_offset": 1, "clip_sample": False}
        self.scheduler.register_to_config(**{k: v for k, v in settings.items() if k in self.scheduler.config})

    def check(self, job: Job) -> None:
        """Any prompt fits, since long ones are cut into pieces."""

    def paint(self, jobs: Sequence[Job], on_step: OnStep | None) -> list[Image]:
        """The algorithm. All jobs must need equally many pieces for their prompts, which `Model` sees to."""
        first = jobs[0]
        shape = (self.unet.config["in_channels"], first.height // self.factor, first.width // self.factor)
        states, negative_states = self._states(jobs)  # (N, L, D) each
        sources = generators([job.seed for job in jobs])
        noise = initial_noise(sources, shape).to(self.device)  # (N, C, h, w)
        latents = denoise(
            self.unet,
            self.scheduler,
            noise,
            states,
            steps=first.steps,
            guidance=first.guidance,
            negative_states=negative_states,
            generators=sources,
            on_step=on_step,
        )
        with torch.no_grad():
            pixels = vaes.decode(self.vae, latents)  # (N, 3, H, W)
        return to_images(pixels)

    def _states(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor | None]:
        encode = functools.partial(encode_prompts, self.text_encoder, self.tokenizer)
        if jobs[0].guidance == 1:
            return torch.cat([encode([job.prompt]) for job in jobs]), None
        pairs = torch.stack([encode([job.negative, job.prompt]) for job in jobs])  # (N, 2, L, D)
        return pairs[:, 1], pairs[:, 0]

    def pieces(self, job: Job) -> int:
        """How many pieces the job's prompts are cut into."""
        length = texts.length_of(self.text_encoder, self.tokenizer)
        prompts = [job.prompt] if job.guidance == 1 else [job.prompt, job.negative]
        return max(len(texts.chunks(texts.token_ids(self.tokenizer, prompt), length)) for prompt in prompts)
