"""The routes of stable-diffusion-webui (A1111), for clients written for it; they log in with any name and a token."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from limner.diffusion.samplers import SAMPLERS, fitting
from limner.errors import ConfigError
from limner.generation import provenance
from limner.generation.jobs import Spec
from limner.serving.access import Client, From
from limner.serving.answers import documented
from limner.serving.openai_api import drawn
from limner.serving.schemas import PIXEL, JobRequest, JobView, Word, requesting
from limner.serving.service import Served, Service

routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"])


def _lot(seed: Any) -> Any:
    """-1 is A1111's word for a seed by lot."""
    return None if seed == -1 else seed


ADDED = re.compile(r"(?<!\s)\s*+<lora:([^<>:]++)(?::([^<>]*+))?>")
"""How A1111's clients ask for a LoRA, in the prompt. Of a text of any length it looks at each place once."""


class Overrides(BaseModel):
    """Settings for one request."""

    sd_model_checkpoint: str | None = None


class Txt2Img(BaseModel):
    """A1111's request. Fields of A1111's that are not here are without effect."""

    model_config = requesting()

    prompt: str
    """<lora:NAME:WEIGHT> in it draws with that LoRA."""
    negative_prompt: str | None = None
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(_lot)] = None
    """-1 or nothing draws one by lot."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    cfg_scale: Annotated[float, Field(ge=1, le=100)] | None = None
    width: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Width or height alone has the model's own beside it; without both, a picture to begin with gives the shape."""
    height: Annotated[int, Field(ge=1, le=8192)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1000)] = 1
    n_iter: Annotated[int, Field(ge=1, le=100)] = 1
    sampler_name: Word | None = None
    """One of /sdapi/v1/samplers, or a name that `limner generate --scheduler` takes; the model's own without."""
    sampler_index: Word | None = None
    """The same under an older name."""
    scheduler: str | None = None
    """`Karras` for the sampler with those noise levels; others are without effect."""
    send_images: bool = True
    override_settings: Overrides = Overrides()

    def to_job(self, model: str, spec: Spec, **pictures: Any) -> JobRequest:
        """The same, as a job of that model; `pictures` are image, mask and strength. Raises ConfigError."""
        sampler = self.sampler_name or self.sampler_index or None
        karras = (self.scheduler or "").lower() == "karras" and not (sampler or "").lower().endswith("karras")
        return JobRequest(
            **pictures,
            prompt=ADDED.sub("", self.prompt),
            loras=tuple(":".join(filter(None, both)) for both in ADDED.findall(self.prompt)),
            negative=self.negative_prompt or "",
            model=model,
            n=self.batch_size * self.n_iter,
            seed=self.seed,
            steps=self.steps,
            guidance=self.cfg_scale,
            size=self._size(spec),
            scheduler=f"{sampler} Karras" if sampler and karras else sampler,
        )

    def _size(self, spec: Spec) -> str | None:
        """WIDTHxHEIGHT. Raises ConfigError where one of both is the model's own, which it doesn't tell."""
        if self.width is None and self.height is None:
            return None
        if spec.size is None and (self.width is None or self.height is None):
            raise ConfigError(f"A {spec.pipeline} doesn't tell its own size; name width and height, or neither.")
        width, height = spec.size or (None, None)
        return f"{self.width or width}x{self.height or height}"


class Img2Img(Txt2Img):
    """The same with a picture to begin with."""

    model_config = requesting(init_images=[PIXEL], denoising_strength=0.6)

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    """One, in base64."""
    mask: str | None = None
    """White where it is redrawn, in base64."""
    inpainting_mask_invert: Literal[0, 1] = 0
    """1: black where it is redrawn."""
    denoising_strength: Annotated[float, Field(gt=0, le=1)] | None = None


class Drawn(BaseModel):
    """The pictures."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    images: list[str]
    """PNG in base64."""
    parameters: dict[str, Any]
    """The request."""
    info: str
    """JSON: seeds, and the settings as A1111 writes them."""


class Progress(BaseModel):
    """Of the job that is being drawn, the newest where there are several."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    progress: float
    """0 to 1."""
    eta_relative: float
    """Seconds left, as far as known."""
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


class Options(BaseModel):
    """What of A1111's options is known here."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    sd_model_checkpoint: str
    """The model of this client's requests that name none, until the server ends."""


class Named(BaseModel):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class Added(BaseModel):
    """A LoRA."""

    name: str
    alias: str
    path: str
    metadata: dict[str, str]


class SdModel(BaseModel):
    """A model."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


@routes.post("/txt2img", responses=documented(400, 404, 409, 413, 429, 500))
async def txt2img(request: Txt2Img, service: Served, client: From) -> Drawn:
    """Draw, and answer when it is done."""
    return await _answer(request, service, client)


@routes.post("/img2img", responses=documented(400, 404, 409, 413, 429, 500))
async def img2img(request: Img2Img, service: Served, client: From) -> Drawn:
    """Draw on a picture, and answer when it is done."""
    mask = request.mask
    if mask is not None and request.inpainting_mask_invert:
        mask = await run_in_threadpool(service.uploads.inverted, mask)
    pictures = {"image": request.init_images[0], "mask": mask, "strength": request.denoising_strength}
    return await _answer(request, service, client, **pictures)


async def _answer(request: Txt2Img, service: Service, client: Client, **pictures: Any) -> Drawn:
    model = service.model_name(request.override_settings.sd_model_checkpoint or service.chosen.get(client.owner))
    job, files = await drawn(service, request.to_job(model, service.specs[model], **pictures), client)
    contents = [await run_in_threadpool(file.read_bytes) for file in files]
    records = [await run_in_threadpool(provenance.read, file) for file in files]
    info = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "seed": job.images[0].seed,
        "all_seeds": [image.seed for image in job.images],
        "all_prompts": [record["prompt"] for record in records],
        "width": job.images[0].width,
        "height": job.images[0].height,
        "steps": records[0]["steps"],
        "cfg_scale": records[0]["guidance"],
        "sd_model_name": job.settings["model"],
        "infotexts": [provenance.parameters(record) for record in records],
        "job": job.id,
    }
    images = [base64.b64encode(content).decode() for content in contents] if request.send_images else []
    return Drawn(images=images, parameters=request.model_dump(exclude={"init_images", "mask"}), info=json.dumps(info))


@routes.get("/progress", responses=documented())
def progress(service: Served, client: From) -> Progress:
    """How far the job is that is drawn now."""
    running = service.listed(client.scope, state="running", limit=1)
    waiting = len(service.listed(client.scope, state="queued", limit=200))
    job = running[0] if running else None
    state = {
        "job": job.id if job else "",
        "job_count": waiting + bool(job),
        "job_no": 0,
        "sampling_step": job.step if job else 0,
        "sampling_steps": job.steps if job else 0,
        "interrupted": False,
        "skipped": False,
    }
    if job is None:
        return Progress(progress=0, eta_relative=0, state=state)
    done = job.step / max(job.steps, 1)
    return Progress(progress=done, eta_relative=_left(job, done), state=state)


def _left(job: JobView, done: float) -> float:
    """Seconds until a job is done, at its pace so far."""
    taken = time.time() - (job.started or time.time())
    return round(taken / done * (1 - done), 2) if done else 0.0


@routes.post("/interrupt", responses=documented())
def interrupt(service: Served, client: From) -> dict[str, Any]:
    """Cancel what is drawn now."""
    for job in service.listed(client.scope, state="running", limit=1):
        service.cancel(job.id)
    return {}


@routes.get("/options", responses=documented())
def options(service: Served, client: From) -> Options:
    """What holds for this client."""
    return Options(sd_model_checkpoint=service.model_name(service.chosen.get(client.owner)))


@routes.post("/options", responses=documented(400, 404, 413))
def set_options(given: Overrides, service: Served, client: From) -> None:
    """Choose the model of this client's requests that name none."""
    if given.sd_model_checkpoint is not None:
        service.chosen[client.owner] = service.model_name(given.sd_model_checkpoint)


@routes.get("/samplers", responses=documented())
def samplers(service: Served, client: From) -> list[Named]:
    """The samplers that fit this client's model."""
    spec = service.specs[service.model_name(service.chosen.get(client.owner))]
    fit = fitting(spec.scheduler) if spec.scheduler else []
    return [Named(name=SAMPLERS[name].label, aliases=[name], options={}) for name in fit]


@routes.get("/sd-models", responses=documented())
def sd_models(service: Served) -> list[SdModel]:
    """The models that a request may name in override_settings."""
    return [SdModel(title=name, model_name=name, filename=name) for name in service.specs]


@routes.get("/loras", responses=documented())
def loras(service: Served) -> list[Added]:
    """The LoRAs that a prompt may name."""
    return [Added(name=name, alias=name, path=name, metadata={}) for name in service.shelf.loras]
