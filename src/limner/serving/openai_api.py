"""The image routes of OpenAI's API, for clients written for it."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, HTTPException, Request, Response, UploadFile
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from limner.serving.access import Client, From
from limner.serving.answers import Failed, documented
from limner.serving.schemas import BestOf, Count, JobRequest, JobView, Loras, Word, requesting
from limner.serving.service import Served, Service
from limner.serving.uploads import in_base64

JOB = {"X-Limner-Job": {"description": "The job behind it, for /v1/jobs.", "schema": {"type": "string"}}}
routes = APIRouter(prefix="/v1", tags=["openai"])


class GenerationRequest(BaseModel):
    """OpenAI's request with Limner's settings beside it. Fields of OpenAI's that are not here are without effect."""

    model_config = requesting()

    prompt: str
    """What to draw."""
    model: str | None = None
    """One of /v1/models; the first of them when left out."""
    n: Count | None = None
    """Pictures; one when left out."""
    size: Word | None = None
    """WIDTHxHEIGHT in pixels; `auto` is the model's own, as without."""
    response_format: Literal["url", "b64_json"] | None = None
    """`b64_json` when left out, as OpenAI's newer models answer."""
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    """Answers come whole; /v1/jobs/{id}/events tells of their progress."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Limner's: seed of the first picture, the next ones count on; drawn by lot when left out."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Limner's: denoising steps."""
    guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    """Limner's: how strongly the prompt is followed; 1 is off."""
    negative_prompt: str | None = None
    """Limner's: what the pictures should not show."""
    scheduler: Word | None = None
    """Limner's: by its name, as euler_a or dpmpp_2m_karras."""
    best_of: BestOf = None
    """Limner's: draw so many, and answer with the `n` that fit the prompt best."""
    loras: Loras = ()
    """Limner's: LoRAs to draw with, NAME or NAME:WEIGHT."""

    def to_job(self, **pictures: Any) -> JobRequest:
        """The same, as a job; `pictures` are image, mask and strength of an edit."""
        return JobRequest(
            **pictures,
            prompt=self.prompt,
            negative=self.negative_prompt or "",
            model=self.model,
            n=self.n or 1,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            size=None if self.size == "auto" else self.size,
            scheduler=self.scheduler,
            best_of=self.best_of,
            loras=self.loras,
        )


class EditRequest(GenerationRequest):
    """The same as a form, with a picture."""

    model_config = requesting(image="garden.png", strength=0.6)

    image: Annotated[UploadFile, Field(validation_alias=AliasChoices("image", "image[]"))]
    """The picture to begin with."""
    mask: UploadFile | None = None
    """A picture of its size: see-through, or white where nothing is see-through, is what is redrawn."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Limner's: share of the steps that are taken from the picture."""
    loras: Annotated[Loras, Field(validation_alias=AliasChoices("loras", "loras[]"))] = ()
    """As for a generation; OpenAI's client writes a list of a form with brackets."""


class GeneratedImage(BaseModel):
    """One picture, in one of two ways."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    b64_json: str | None = None
    """The PNG in base64, with all settings in its metadata."""
    url: str | None = None
    """Where the PNG is."""
    seed: int
    """Limner's: with which the picture is drawn again."""


class Generated(BaseModel):
    """The pictures, in the order of their seeds, or the best first."""

    created: int
    """Seconds since 1970."""
    data: list[GeneratedImage]
    output_format: Literal["png"] = "png"
    size: str
    """WIDTHxHEIGHT in pixels."""


class ModelInfo(BaseModel):
    """A model that may be named."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "limner"
    loras: list[str]
    """Limner's: names of the LoRAs that may be asked for, of which not all need be for this model."""
    report: str | None
    """Limner's: where the page is that tells how good it is, if there is one."""


class ModelList(BaseModel):
    """All models, the one for requests without a name first."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


async def drawn(service: Service, request: JobRequest, client: Client) -> tuple[JobView, list[Path]]:
    """The job of a request once it is done, and where its pictures lie.

    Raises as `Service.draw` does, and Failed where it failed or was cancelled.
    """
    job, files = await service.draw(request, client.owner)
    if job.state != "done":
        raise Failed(job)
    if not files or len(files) < len(job.images):  # which make room for others only a minute after the end
        raise HTTPException(404, f"The pictures of job {job.id} are not there any more.")
    return job, files


@routes.post(
    "/images/generations",
    responses=documented(400, 404, 409, 413, 429, 500) | {200: {"headers": JOB}},
    response_model_exclude_none=True,
)
async def generate(
    request: GenerationRequest, http: Request, response: Response, service: Served, client: From
) -> Generated:
    """Draw, and answer when it is done. A client that goes away leaves its job in the queue."""
    return await _answer(request, request.to_job(), http, response, service, client)


@routes.post(
    "/images/edits",
    responses=documented(400, 404, 409, 413, 429, 500) | {200: {"headers": JOB}},
    response_model_exclude_none=True,
)
async def edit(
    request: Annotated[EditRequest, Form()], http: Request, response: Response, service: Served, client: From
) -> Generated:
    """Draw on a picture, and answer when it is done."""
    pictures = {"image": await run_in_threadpool(in_base64, await request.image.read())}
    if request.mask is not None:
        pictures["mask"] = await run_in_threadpool(service.uploads.white_mask, await request.mask.read())
    return await _answer(
        request, request.to_job(**pictures, strength=request.strength), http, response, service, client
    )


async def _answer(
    request: GenerationRequest, wanted: JobRequest, http: Request, response: Response, service: Service, client: Client
) -> Generated:
    job, files = await drawn(service, wanted, client)
    response.headers["X-Limner-Job"] = job.id
    data = []
    for image, file in zip(job.images, files, strict=True):
        way: dict[str, Any] = (
            {"url": str(http.url_for("image", id=image.id))}
            if request.response_format == "url"
            else {"b64_json": base64.b64encode(await run_in_threadpool(file.read_bytes)).decode()}
        )
        data.append(GeneratedImage(seed=image.seed, **way))
    return Generated(created=int(time.time()), data=data, size=f"{job.images[0].width}x{job.images[0].height}")


@routes.get("/models", responses=documented())
def models(service: Served) -> ModelList:
    """The models that this server draws with."""
    return ModelList(data=[_info(name, service) for name in service.specs])


@routes.get("/models/{model:path}", responses=documented(404))
def model(model: str, service: Served) -> ModelInfo:
    """One of them."""
    return _info(service.model_name(model), service)


def _info(name: str, service: Service) -> ModelInfo:
    loras = list(service.shelf.loras) if service.specs[name].own_loop else []
    return ModelInfo(id=name, loras=loras, report=service.report_url(name))
