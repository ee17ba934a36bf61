"""What goes over the wire at /v1/jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from limner.config.stages import MOST_PICTURES
from limner.serving.tables import State

EXAMPLE: dict[str, JsonValue] = {"prompt": "A golden retriever playing in a field.", "seed": 7, "steps": 20}

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
"""A PNG of one grey pixel."""


def requesting(**more: JsonValue) -> ConfigDict:
    """Of the models of requests for pictures, whose example needs `more`."""
    extra: dict[str, JsonValue] = {"examples": [EXAMPLE | more]}
    return ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False, json_schema_extra=extra)


Count = Annotated[int, Field(ge=1, le=MOST_PICTURES)]
"""Of pictures; a server allows fewer."""
BestOf = Count | None
Word = Annotated[str, Field(max_length=64)]
"""A setting that is written as text."""
Loras = Annotated[tuple[Annotated[str, Field(max_length=300)], ...], Field(max_length=8)]


class JobRequest(BaseModel):
    """What to draw: the settings of `limner generate`, but for reuse and embeddings. What is left out is the model's
    own."""

    model_config = requesting() | ConfigDict(extra="forbid")

    prompt: str
    """What to draw."""
    negative: str = ""
    """What the pictures should not show."""
    model: str | None = None
    """One of /v1/models; the first of them when left out."""
    n: Count = 1
    """Pictures; picture i has the seed `seed + i`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the first picture; drawn by lot when left out."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    """How strongly the prompt is followed; 1 is off."""
    size: Word | None = None
    """Pixels as SIDE or WIDTHxHEIGHT."""
    scheduler: Word | None = None
    """By its name, as euler_a or dpmpp_2m_karras."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0
    """How much of guidance's contrast is taken back."""
    variation: Word | None = None
    """SEED:STRENGTH: turn the noise towards that seed's; it is then that seed that counts on."""
    image: str | None = None
    """Picture to begin with, in base64, or the digest that stands in the settings of an earlier job."""
    mask: str | None = None
    """Picture that is white where `image` is redrawn, in the same way."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the steps that are taken from `image`."""
    best_of: BestOf = None
    """Draw so many, and keep the `n` that fit the prompt best, as the model's own CLIP sees it."""
    loras: Loras = ()
    """LoRAs to draw with, NAME or NAME:WEIGHT; /v1/models lists the names."""

    @property
    def pictures(self) -> dict[str, str]:
        """What it begins with, by field."""
        return {name: text for name, text in (("image", self.image), ("mask", self.mask)) if text is not None}


class ImageView(BaseModel):
    """A picture that is there."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    url: str
    """Where the PNG is, at this server; its metadata has every setting."""
    number: int
    """From 0: which of the pictures that are drawn for the job it is."""
    seed: int
    """Its own, which draws it alone."""
    variation: str | None
    """Its own too, where the job has one, whose seed then counts on."""
    width: int
    height: int
    score: float | None
    """How well it fits the prompt, with `best_of`: the cosine of both in the model's CLIP."""


def own(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Seed and variation of one of a job's pictures, as `make_jobs` counts them."""
    seed, variation = settings["seed"], settings.get("variation")
    if not variation:
        return {"seed": seed + number, "variation": None}
    other, _, strength = variation.partition(":")
    return {"seed": seed, "variation": f"{int(other) + number}:{strength}"}


class JobView(BaseModel):
    """A job as it stands."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    number: int
    """Its place in the order of all jobs; `before` of the list takes it."""
    state: State
    place: int | None
    """How many jobs are before it in the queue, while it is queued."""
    step: int
    """Denoising steps done, of all its pictures together."""
    steps: int
    """Those to do; one a picture where only the model's pipeline knows how many it takes."""
    settings: dict[str, Any]
    """What was asked for, as POST /v1/jobs takes it again; the model and the seed are always named."""
    images: list[ImageView]
    """Pictures that are done, in the order of their seeds; with `best_of` only at the end, the best first."""
    error: str | None
    """Why it failed."""
    fault: bool
    """Whether the server is to blame for that, and not what was asked for."""
    created: float
    """Seconds since 1970, as the next two."""
    started: float | None
    finished: float | None


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobView]


class ErrorBody(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The body of every answer from 400 on."""

    error: ErrorBody
