"""A loaded model: call it with a prompt to get pictures."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from limner import artifacts
from limner.errors import ModelError
from limner.generation import painters, provenance, ranking, setup, sources
from limner.generation.engine import OnStep
from limner.generation.jobs import Job, Spec, make_jobs, read_embeddings, read_loras, read_spec, warn_of_sizes
from limner.generation.painters import LatentDiffusion, OnPreview, Painter
from limner.generation.pipeline import Pipeline
from limner.models import hub, inversion, lora
from limner.models.inversion import Inversion
from limner.models.lora import Lora

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.config import Engine, Format, Precision


@dataclass(frozen=True)
class Picture:
    """A picture and the record of its origin, which `save` writes into the file."""

    image: Image
    record: dict[str, Any]

    def save(self, folder: Path | str, kind: Format = "png", quality: int = 95) -> Path:
        """Write a file named after prompt and seed; an earlier picture is never replaced. Raises OSError.

        `quality`, 1 to 100, is of JPEG and WebP. Raises ConfigError for another kind, and
        where a prompt is too long for a JPEG's record.
        """
        return provenance.save(self.image, self.record, Path(folder), kind, quality)


@dataclass(frozen=True)
class Pictures:
    """What one call of a model drew, in order: the prompts, and for each its seeds."""

    pictures: tuple[Picture, ...]

    @property
    def images(self) -> list[Image]:
        """The pictures without their records."""
        return [picture.image for picture in self.pictures]

    def save(self, folder: Path | str, kind: Format = "png", quality: int = 95) -> list[Path]:
        """Write all; see `Picture.save`."""
        return [picture.save(folder, kind, quality) for picture in self.pictures]


class Model:
    """A text-to-image model on a device."""

    def __init__(
        self,
        spec: Spec,
        device: str | None = None,
        loras: Sequence[Lora] = (),
        embeddings: Sequence[Inversion] = (),
        precision: Precision = "auto",
        low_memory: bool = False,
        engine: Engine = "torch",
    ) -> None:
        """Load what `spec` describes, and add LoRAs and textual inversions to it.

        Raises ModelError, also where one of those doesn't fit, or ConfigError for a device that is not there.
        """
        self.spec = spec
        self.device = setup.choose_device(device)
        self.setup = setup.choose(self.device, precision, low_memory, engine)
        self.loras = loras
        self.embeddings = embeddings
        with painters.enough_memory("this model", "draw with --low-memory, or choose a smaller one"):
            self.painter = self._new_painter()

    @classmethod
    def load(
        cls,
        ref: str,
        device: str | None = None,
        loras: Sequence[str] = (),
        embeddings: Sequence[str] = (),
        precision: Precision = "auto",
        low_memory: bool = False,
        engine: Engine = "torch",
    ) -> Self:
        """Load `builtin`, a folder or a hub id to `device`, the GPU when there is one; add LoRAs, each FILE or
        FILE:WEIGHT, and textual inversions, each FILE or FILE:TOKEN.

        precision is "fp32", "bf16", or "auto", which is bf16 where the device computes faster in it. low_memory keeps
        only that network in memory which is in use. engine is what computes, "torch", or "openvino" on a CPU. Raises as
        `Model` does, and where one of those can't be read.
        """
        spec = read_spec(ref)
        added = read_loras(spec, loras), read_embeddings(spec, embeddings)
        return cls(spec, device, *added, precision, low_memory, engine)

    def _new_painter(self) -> Painter:
        """What draws. Raises ConfigError, ModelError."""
        spec, setup = self.spec, self.setup
        alter = self._alter if self.loras or self.embeddings else None
        if setup.engine == "openvino":
            from limner.generation.openvino import OpenVinoDiffusion

            if not spec.own_loop:
                raise ModelError(f"{spec.ref} is a {spec.pipeline}, which draws with torch alone; leave out --engine.")
            return OpenVinoDiffusion(spec, setup, alter, lambda: self.identity)
        return LatentDiffusion(spec, setup, alter) if spec.own_loop else Pipeline(spec, setup)

    def _alter(self, name: str, network: Any, tokenizer: Any) -> None:
        """Add to a network what is asked for beside the model itself."""
        if self.loras and name in lora.ALTERED:
            lora.fuse(self.loras, name, network)
        if name == "text_encoder":
            inversion.add(self.embeddings, tokenizer, network)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        size: str | int | None = None,
        scheduler: str | None = None,
        guidance_rescale: float = 0.0,
        reuse: int = 1,
        variation: str | None = None,
        image: Path | str | None = None,
        mask: Path | str | None = None,
        strength: float | None = None,
        best_of: int | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
    ) -> Pictures:
        """Draw `n` pictures a prompt, with the seeds `seed`, `seed + 1`, ...

        Prompts may have weights and alternatives (`limner.generation.language`). steps, guidance, size (SIDE or
        "WIDTHxHEIGHT", in pixels) and scheduler (a name of `limner.diffusion.samplers`) are the model's own when left
        out; guidance 1 is off, and guidance_rescale, from 0 to 1, takes some of its contrast back. With a `reuse` of 2
        or more the inner blocks of the U-Net are computed at each so many steps alone. A prompt and a seed make one
        picture, whatever is drawn beside it: bit for bit on a CPU, and but for rounding on a GPU, whose sums depend on
        the batch in their last bits.

        `image` is a file to begin with, of which the share `strength` of the steps makes something new, and `mask` a
        file that is white where to redraw it. `variation`, SEED:STRENGTH, turns the noise towards another seed's; it
        is then that seed that rises. `best_of` draws so many a prompt and gives the `n` that fit it best, the best
        first. Raises ConfigError for a setting that doesn't fit, DataError for a file that is no picture.
        """
        jobs = make_jobs(
            self.spec,
            [prompts] if isinstance(prompts, str) else prompts,
            n=n if best_of is None else best_of,
            seed=seed,
            steps=steps,
            guidance=guidance,
            negative=negative,
            size=size,
            scheduler=scheduler,
            guidance_rescale=guidance_rescale,
            reuse=reuse,
            variation=variation,
            image=None if image is None else sources.read_picture(Path(image)),
            mask=None if mask is None else sources.read_mask(Path(mask)),
            strength=strength,
        )
        warn_of_sizes(self.spec, jobs)
        pictures = self.draw(jobs, batch_size=batch_size, on_step=on_step, on_preview=on_preview)
        return Pictures(tuple(pictures if best_of is None else self.best(pictures, n, best_of)))

    def settle(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with the settings that were left to the model. Raises ConfigError where one can't be drawn."""
        return [self.painter.settle(job) for job in jobs]

    def at_once(self, job: Job, batch_size: int = 8) -> int:
        """How many pictures like a settled job's `draw` draws at once."""
        return self.painter.at_once(job, batch_size)

    def draw(
        self,
        jobs: Sequence[Job],
        *,
        batch_size: int = 8,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
    ) -> Iterator[Picture]:
        """Draw the jobs, in their order, each as soon as its batch is done. Raises ConfigError, ModelError.

        The two functions are called one at a time, on a CPU by other threads than the caller's.
        """
        jobs = self.settle(jobs)
        for job, image in zip(jobs, self.painter.paint(jobs, batch_size, on_step, on_preview)):
            yield Picture(image, self.record(replace(job, width=image.width, height=image.height)))

    def record(self, job: Job) -> dict[str, Any]:
        """What the picture of this job says of its origin."""
        facts = {**self.facts, "scheduler": _configuration(painters.scheduler_for(self.painter, job))}
        device = {**self.device_facts, "threads": self.painter.threads(job)}
        return provenance.make_record(job, facts, device)

    def best(self, pictures: Iterable[Picture], n: int, of: int) -> Iterator[Picture]:
        """Of each `of` pictures that follow each other, of one prompt, the `n` that fit it best, the best first.

        Their records have `score`, the cosine of prompt and picture in the model's own CLIP, and `best_of`. Raises
        ConfigError as `ranking.check`.
        """
        ranking.check(self.spec, n, of)
        pictures = iter(pictures)
        while drawn := list(itertools.islice(pictures, of)):
            scored = [self.scored(picture, of) for picture in drawn]
            yield from sorted(scored, key=lambda picture: -picture.record["score"])[:n]  # of equal ones the first

    def scored(self, picture: Picture, of: int) -> Picture:
        """The picture, whose record says how well it fits its prompt and of how many it is one. Raises ModelError."""
        score = self.ranker.score(picture.record["prompt"], picture.image)
        return replace(picture, record={**picture.record, "best_of": of, "score": score})

    @functools.cached_property
    def ranker(self) -> ranking.Ranker:
        """The model's own CLIP. Raises ModelError."""
        with painters.enough_memory("the model's CLIP", "leave out best_of"):
            return ranking.Ranker(self.spec, self.device)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The model for a picture's record: name, scheduler, what is added, the sha256 of each weight file and of all.

        LoRAs and textual inversions have their own sha256; that of all is the model's without them.
        """
        together = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in self.weights.items()).encode())
        return {
            "ref": self.spec.ref,
            "pipeline": self.spec.pipeline,
            "scheduler": _configuration(self.painter.scheduler),
            "weights": self.weights,
            "sha256": together.hexdigest(),
            "loras": [
                {"ref": added.ref, "sha256": digest, "weight": added.weight}
                for added, digest in zip(self.loras, self.lora_hashes)
            ],
            "embeddings": [
                {"ref": added.ref, "sha256": artifacts.sha256(added.file), "token": added.token}
                for added in self.embeddings
            ],
        }

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """The sha256 of each weight file that is read."""
        return {
            f"{part}/{file.name}": artifacts.sha256(file)
            for part in self.spec.parts
            for file in hub.weight_files(self.spec.folder / part)
        }

    @functools.cached_property
    def lora_hashes(self) -> list[str]:
        """The sha256 of each LoRA."""
        return [artifacts.sha256(added.file) for added in self.loras]

    @property
    def identity(self) -> str:
        """Tells the weights of the networks with their LoRAs from any others."""
        return json.dumps([self.weights, [*zip(self.lora_hashes, (added.weight for added in self.loras))]])

    @functools.cached_property
    def device_facts(self) -> dict[str, Any]:
        """The device for a picture's record."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "type": self.device.type,
            "name": name,
            "threads": torch.get_num_threads(),
            "precision": self.setup.precision,
            "low_memory": self.setup.low_memory,
            "engine": self.setup.engine,
        }


def _configuration(scheduler: Any) -> dict[str, Any]:
    """A scheduler's settings as JSON has them, which doesn't know infinity."""
    settings: dict[str, Any] = json.loads(scheduler.to_json_string(), parse_constant=str)
    return settings
