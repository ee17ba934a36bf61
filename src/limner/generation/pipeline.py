"""Any other text-to-image pipeline of Diffusers as a painter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from limner.errors import ConfigError, ModelError
from limner.generation import language
from limner.generation.engine import OnStep
from limner.generation.jobs import GUIDANCE, STEPS, Job, Spec
from limner.generation.painters import OnPreview, enough_to_draw, scheduler_for
from limner.generation.setup import Setup
from limner.models import hub, loading

if TYPE_CHECKING:
    from PIL.Image import Image

OPTIONS = {
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "steps": "num_inference_steps",
    "size": "width",
}
"""What Diffusers' pipelines call our settings."""
NOT_PICTURES = re.compile("audio|frame|video")
"""In the name of an argument, of pipelines that make something else."""


class Pipeline:
    """Any other text-to-image pipeline of Diffusers, called as it is, one picture at a time."""

    def __init__(self, spec: Spec, setup: Setup) -> None:
        """Load from a model folder. Raises ModelError, and ConfigError for little memory on a CPU."""
        if setup.low_memory and setup.device.type == "cpu":
            raise ConfigError(
                f"{spec.ref} is a {spec.pipeline}, which is in memory as a whole on a CPU; leave out --low-memory."
            )
        index = loading.pipeline_index(spec.folder)
        left_out: dict[str, Any] = {name: None for name in hub.NOT_LOADED if name in index}
        from diffusers import DiffusionPipeline

        with loading.reading("pipeline", spec.folder):
            self.pipeline = DiffusionPipeline.from_pretrained(
                spec.folder,
                dtype=setup.dtype,
                variant=hub.variant(file.name for part in spec.parts for file in (spec.folder / part).glob("*")),
                use_safetensors=True,
                local_files_only=True,
                **left_out,
            )
            if setup.low_memory:
                self.pipeline.enable_model_cpu_offload(device=setup.device)
            else:
                self.pipeline.to(setup.device)
            self.scheduler = self.pipeline.scheduler
        self.pipeline.set_progress_bar_config(disable=True)
        self.name = spec.pipeline
        # An enumeration, by which those pipelines say that it is the user's choice
        parts = inspect.signature(type(self.pipeline).__init__).parameters
        self.takes_any_scheduler = "KarrasDiffusionSchedulers" in str(parts.get("scheduler"))
        self.takes = inspect.signature(self.pipeline.__call__).parameters
        needed = [name for name, p in self.takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if "prompt" not in self.takes or set(needed) - {"prompt"}:
            raise ModelError(
                f"{spec.ref} is a {self.name}, which needs more than a prompt or none; name another model."
            )
        if not makes_pictures(self.takes):
            raise ModelError(f"{spec.ref} is a {self.name}, which makes no pictures; name another model.")

    def settle(self, job: Job) -> Job:
        """Steps and guidance are the pipeline's own when left out, and stay None where it has none; a prompt that it
        would cut is refused."""
        given = {"negative": job.negative, "guidance": job.guidance, "guidance_rescale": job.guidance_rescale}
        given |= {"steps": job.steps, "size": job.width}
        for setting, value in given.items():
            if value and OPTIONS[setting] not in self.takes:
                raise ConfigError(f"{self.name} has no {setting} setting; leave it out for this model.")
        if any(map(language.marked, (job.prompt, job.negative))):
            raise ConfigError(
                f"{self.name} reads prompts as they are; leave weights such as (word:1.3) and BREAK out for this model."
            )
        if job.scheduler is not None:
            if not self.takes_any_scheduler:
                raise ConfigError(f"{self.name} draws with its own scheduler alone; leave out --scheduler.")
            scheduler_for(self, job)
        for what, text in (("prompt", job.prompt), ("negative prompt", job.negative)):
            if not self._reads_whole(language.unescaped(text)):
                raise ConfigError(f"The {what} {text[:40]!r}... is longer than {self.name} reads; shorten it.")
        steps, guidance = job.steps, job.guidance
        if OPTIONS["steps"] in self.takes:
            steps = steps or self._default(OPTIONS["steps"]) or STEPS
        if OPTIONS["guidance"] in self.takes:
            guidance = guidance or self._default(OPTIONS["guidance"]) or GUIDANCE
        return replace(job, steps=steps, guidance=guidance)

    def threads(self, job: Job) -> int:
        """All."""
        return torch.get_num_threads()

    def at_once(self, job: Job, batch_size: int) -> int:
        """One."""
        return 1

    def paint(
        self, jobs: Sequence[Job], batch_size: int, on_step: OnStep | None, on_preview: OnPreview | None = None
    ) -> Iterator[Image]:
        """One call a job, without previews."""
        for job in jobs:
            with loading.quiet(), enough_to_draw([job]):
                image = self._draw(job)
            if on_step is not None:
                on_step(job.steps or 0)
            yield image

    def _draw(self, job: Job) -> Image:
        wanted = {
            "prompt": language.unescaped(job.prompt),
            "negative_prompt": language.unescaped(job.negative) or None,
            "num_inference_steps": job.steps,
            "guidance_scale": job.guidance,
            "guidance_rescale": job.guidance_rescale,
            "width": job.width,
            "height": job.height,
            "generator": torch.Generator("cpu").manual_seed(job.seed),
        }
        self.pipeline.scheduler = scheduler_for(self, job)
        try:
            image: Image = self.pipeline(**{k: v for k, v in wanted.items() if k in self.takes}).images[0]
        except ValueError as error:
            raise ConfigError(f"{self.name} can't draw this ({error}); change the settings.") from None
        return image

    def _default(self, option: str) -> Any:
        return self.takes[option].default if option in self.takes else None

    def _reads_whole(self, prompt: str) -> bool:
        """Whether one of the pipeline's tokenizers takes the whole prompt; pipelines cut without a word."""
        parts = self.pipeline.components.items()
        tokenizers = [part for name, part in parts if name.startswith("tokenizer") and part is not None]
        limits = [
            t.model_max_length if "CLIP" in type(t).__name__ else self._default("max_sequence_length") or 10**9
            for t in tokenizers
        ]
        lengths = [len(t(prompt, verbose=False)["input_ids"]) for t in tokenizers]
        return not tokenizers or any(length <= limit for length, limit in zip(lengths, limits))


def makes_pictures(takes: Iterable[str]) -> bool:
    """Whether a pipeline with these arguments makes pictures, and not sounds or films."""
    return not any(map(NOT_PICTURES.search, takes))
