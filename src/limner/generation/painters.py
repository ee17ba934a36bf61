"""Painters turn jobs into pictures; this one with Limner's own loop over Stable Diffusion's parts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from limner.diffusion import samplers
from limner.diffusion.guidance import is_folded
from limner.errors import ConfigError, ModelError
from limner.generation import lanes
from limner.generation import prompts as texts
from limner.generation.canvas import Sketch
from limner.generation.engine import OnStep, draw, encode_weighted, to_images
from limner.generation.jobs import STABLE_DIFFUSION, Job, Spec
from limner.generation.preview import Preview
from limner.generation.setup import Setup
from limner.models import bare, loading, plain, staged
from limner.models import vae as vaes

if TYPE_CHECKING:
    from PIL.Image import Image

OnPreview = Callable[[Job, Callable[[], "Image"]], None]
"""Called after each step with what makes a picture of how the job is going to look, roughly; only then valid."""

PROMPTS_KEPT = 64  # whose token states are not computed again: half a megabyte each for Stable Diffusion

Alter = Callable[[str, Any, Any], None]
"""Called with the name of a network, the network, and the tokenizer, to add to them."""


class Painter(Protocol):
    """What turns jobs into pictures."""

    scheduler: Any
    """The model's own."""

    def settle(self, job: Job) -> Job:
        """The job with the settings that were left to the painter. Raises ConfigError where it can't be drawn."""

    def threads(self, job: Job) -> int:
        """How many of the processor's threads draw a settled job."""

    def at_once(self, job: Job, batch_size: int) -> int:
        """How many pictures like that of a settled job are drawn at once, where `batch_size` share a batch."""

    def paint(
        self, jobs: Sequence[Job], batch_size: int, on_step: OnStep | None, on_preview: OnPreview | None = None
    ) -> Iterator[Image]:
        """Draw settled jobs, in their order, up to `batch_size` at once. Raises ConfigError, ModelError."""


class LatentDiffusion:
    """A CLIP text encoder, a U-Net and a VAE: Stable Diffusion 1 and 2, and what Limner trains."""

    text_encoder: Any
    unet: Any
    vae: Any

    def __init__(self, spec: Spec, setup: Setup, alter: Alter | None) -> None:
        """Load from a model folder, and alter the networks. Raises ModelError, and as `alter` does."""
        self.ref, self.setup, self.device, self.dtype = str(spec.folder), setup, setup.device, setup.dtype
        self.alter = alter
        # LoRAs, textual inversions and what frees memory work on the libraries' networks alone
        self.source: Any = plain if alter is None and not setup.low_memory else loading
        one_at_a_time = None
        if setup.low_memory:
            from limner.generation.low_memory import OneAtATime

            one_at_a_time = OneAtATime()
        for name in STABLE_DIFFUSION:
            network = self._read(name)
            setattr(self, name, network)
            if one_at_a_time is not None:
                one_at_a_time.keep(network, functools.partial(self._read, name))
        self.scheduler = self.source.load_scheduler(self.ref)
        self.factor = spec.factor
        self._encode = functools.lru_cache(PROMPTS_KEPT)(self._encode_anew)
        if setup.low_memory:
            vaes.decode_in_tiles(self.vae)
        if not hasattr(self.scheduler, "init_noise_sigma"):  # Diffusers' own pipeline fails on these too
            raise ModelError(f"The {type(self.scheduler).__name__} of {spec.ref} is not for a StableDiffusionPipeline.")
        samplers.as_in_stable_diffusion(self.scheduler)

    def _read(self, name: str) -> Any:
        """One of the networks, on the device, with what is added to it."""
        if name == "text_encoder":
            network, self.tokenizer = self.source.load_text_encoder(self.ref, self.dtype)
        else:
            network = {"unet": self.source.load_unet, "vae": self.source.load_vae}[name](self.ref, self.dtype)
        # What transformers leave to convolutions lies channels last; other weights would be turned at each of them
        network = network.to(self.device, memory_format=torch.channels_last)
        if self.alter is not None:
            self.alter(name, network, self.tokenizer)
        bare.lay_bare(network)
        return network

    def settle(self, job: Job) -> Job:
        """The job as it is: the model's files name all settings, and any prompt fits, cut into pieces."""
        return job

    def threads(self, job: Job) -> int:
        """As many as its work keeps busy; all of them where memory is short, so that one is drawn after the other."""
        if self.device.type != "cpu" or self.setup.low_memory:
            return torch.get_num_threads()
        _, height, width = self._latent_shape(job)
        return lanes.threads_for(self._parameters, height * width)

    def at_once(self, job: Job, batch_size: int) -> int:
        """A batch on a GPU, as many as there are threads for on a CPU."""
        return lanes.lanes(self.threads(job)) if self.device.type == "cpu" else batch_size

    @functools.cached_property
    def _parameters(self) -> int:
        """Of the U-Net."""
        return sum(parameter.numel() for parameter in self.unet.parameters())

    def paint(
        self, jobs: Sequence[Job], batch_size: int, on_step: OnStep | None, on_preview: OnPreview | None = None
    ) -> Iterator[Image]:
        """Jobs that differ in prompt, negative prompt and seed only share a batch; on the CPU each has its own, and
        several are drawn side by side.

        There oneDNN and MKL add up in another order for another batch size, from the first convolution on, and for
        another number of threads, so that the last bits of a picture would depend on its neighbours.
        """
        if self.device.type == "cpu":
            yield from self._side_by_side(jobs, on_step, on_preview)
            return
        for _, alike in groupby(jobs, key=self._shape):
            group = list(alike)
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                with loading.quiet(), enough_to_draw(batch):
                    images = self._draw(batch, on_step, on_preview)
                yield from images

    def _side_by_side(
        self, jobs: Sequence[Job], on_step: OnStep | None, on_preview: OnPreview | None
    ) -> Iterator[Image]:
        """Each job alone, those of one number of threads at once."""
        told = threading.Lock()  # callers need not know that several threads draw

        def draw(job: Job, check: Callable[[], None]) -> Image:
            def step(done: int) -> None:
                check()
                if on_step is not None:
                    with told:
                        on_step(done)

            def preview(job: Job, image: Callable[[], Image]) -> None:
                assert on_preview is not None
                with told:
                    on_preview(job, image)

            with loading.quiet(), enough_to_draw([job]):
                return self._draw([job], step, on_preview and preview)[0]

        # A network that is read in bf16 makes that torch's default for all threads meanwhile, also for the one that
        # looks at the picture before; where memory is short, networks are read again and again
        ahead = 1 if self.setup.low_memory else lanes.AHEAD
        for threads, alike in groupby(jobs, key=self.threads):
            yield from lanes.side_by_side(draw, list(alike), threads, ahead)

    def _draw(self, jobs: Sequence[Job], on_step: OnStep | None, on_preview: OnPreview | None = None) -> list[Image]:
        """Pictures of jobs of one shape."""
        first = jobs[0]
        assert first.steps is not None
        assert first.guidance is not None
        assert first.width is not None
        assert first.height is not None
        size, sketch = (first.height, first.width), None
        if first.image is not None:
            assert first.strength is not None
            sketch = Sketch.of(first.image, first.mask, first.strength, size)

        def preview(x0: Tensor) -> None:
            assert on_preview is not None
            for job, latents in zip(jobs, x0.split(1)):
                on_preview(job, functools.partial(self._previewed, latents, size))

        states, negative_states = self._states(jobs)  # (N, L, D) each
        passes = states if negative_states is None else torch.cat([negative_states, states])
        unet, vae = self.networks(first, passes)
        pixels = draw(
            unet,
            scheduler_for(self, first),
            vae,
            states,
            seeds=[job.seed for job in jobs],
            shape=self._latent_shape(first),
            steps=first.steps,
            guidance=first.guidance,
            guidance_rescale=first.guidance_rescale,
            negative_states=negative_states,
            variations=[job.variation for job in jobs],
            sketch=sketch,
            on_step=on_step and (lambda done: on_step(done * len(jobs))),
            on_x0=on_preview and preview,
        )  # (N, 3, H, W)
        return to_images(pixels)

    def _previewed(self, latents: Tensor, size: tuple[int, int]) -> Image:
        """The preview of one picture (1, C, h, w), at its height and width."""
        return to_images(self.preview(latents))[0].resize(size[::-1])

    def networks(self, job: Job, states: Tensor) -> tuple[Any, Any]:
        """U-Net and VAE for one drawing of jobs like this, with token states (N, L, D) of all passes.

        Raises ConfigError where nothing can be reused.
        """
        if self.taken_apart is not None:
            return staged.Passes(self.unet.config, self.taken_apart, job.reuse), self.vae
        if job.reuse > 1:
            raise ConfigError("reuse is for U-Nets of Stable Diffusion's kind, without --low-memory; leave it out.")
        return self.unet, self.vae

    @functools.cached_property
    def taken_apart(self) -> staged.Staged | None:
        """The U-Net taken apart; None where that can't be, or memory is short."""
        return staged.Staged(self.unet) if staged.fits(self.unet.config) and not self.setup.low_memory else None

    @functools.cached_property
    def preview(self) -> Callable[[Tensor], Tensor]:
        """What latents look like, roughly and at once."""
        return Preview(self.vae)

    def _states(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor | None]:
        """Token states of prompts and negative prompts; each pair is encoded alone, so no other changes its bits."""
        if not self._two_passes(jobs[0]):
            return torch.cat([self._encode(job.prompt) for job in jobs]), None
        pairs = torch.stack([self._encode(job.negative, job.prompt) for job in jobs])  # (N, 2, L, D)
        return pairs[:, 1], pairs[:, 0]

    def _encode_anew(self, *prompts: str) -> Tensor:
        return encode_weighted(self.text_encoder, self.tokenizer, prompts)

    def _two_passes(self, job: Job) -> bool:
        return job.guidance != 1 and not is_folded(self.unet)

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        assert job.height is not None
        assert job.width is not None
        return int(self.unet.config["in_channels"]), job.height // self.factor, job.width // self.factor

    def _shape(self, job: Job) -> tuple[Any, ...]:
        """Equal for jobs that can share a batch: the same settings, and prompts cut into as many pieces."""
        length = texts.length_of(self.text_encoder, self.tokenizer)
        prompts = [job.prompt, job.negative] if self._two_passes(job) else [job.prompt]
        pieces = max(len(texts.weighted(self.tokenizer, prompt, length)) for prompt in prompts)
        return pieces, replace(
            job, prompt="", negative="", seed=0, template=None, negative_template=None, variation=None
        )


def enough_to_draw(jobs: Sequence[Job]) -> AbstractContextManager[None]:
    """Say in one sentence that the memory is too small to draw these at once."""
    what = f"{len(jobs)} of {jobs[0].width}x{jobs[0].height} at once" if len(jobs) > 1 else "a picture of this size"
    return enough_memory(what, "choose a smaller --size or batch_size, or --low-memory")


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Raise ConfigError where the memory is too small for `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not loading.is_out_of_memory(error):
            raise
        raise ConfigError(f"The memory is too small for {what}; {remedy}.") from None


def scheduler_for(painter: Painter, job: Job) -> Any:
    """What the painter draws a job with. Raises ConfigError where a scheduler of that name doesn't fit the model."""
    return painter.scheduler if job.scheduler is None else samplers.named(job.scheduler, painter.scheduler)
