"""Settings of the server and of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from limner.config.base import FLAG, Argument, Flag, StageConfig

Data = Annotated[Path, Flag(("--data",))]


class ServeConfig(StageConfig):
    """Draw for other programs and people over HTTP; a job that was accepted survives a kill."""

    models: Annotated[tuple[str, ...], Argument()] = ("builtin",)
    """What may be drawn with, the first unless a request names another: `builtin`, Diffusers folders or hub ids."""
    host: Annotated[str, FLAG] = "127.0.0.1"
    """Address to listen at; anything but this machine's own wants tokens (`limner token add`)."""
    port: Annotated[int, FLAG, Field(ge=0, le=65535)] = 7860
    """Port to listen at; 0 takes a free one."""
    out: Data = Path("served")
    """Folder for the queue and the pictures; servers with the same one share their work."""
    device: Annotated[str | None, FLAG] = None
    """`cpu` or `cuda`; the GPU when there is one."""
    database: str | None = None
    """URL of a PostgreSQL database for the queue, postgresql://USER:PASSWORD@HOST/NAME; SQLite in the folder without
    it."""
    loras: Annotated[tuple[str, ...], Flag(("--lora",))] = ()
    """LoRA that requests may name, by the name of its file or run, as FILE or FILE:WEIGHT; may be repeated."""
    reports: dict[str, Path] = Field(default={})
    """Pages that `limner evaluate` wrote, by the name of the model; without it report.html in the model's folder."""
    disk: PositiveFloat = 20
    """GiB that pictures, and what they began with, may take; above it the jobs that ended longest ago are removed."""
    batch_size: PositiveInt = 8
    """Pictures drawn at once on a GPU, of one or several jobs of the same shape."""
    memory: PositiveFloat | None = None
    """GiB that the weights of loaded models may take together; above it the one used longest ago is unloaded."""
    require_tokens: bool | None = None
    """Whether every request needs a token; by default where others than this machine can reach the server."""
    rate: PositiveInt = 60
    """Jobs a minute that one token may begin."""
    open_jobs: PositiveInt = 100
    """Jobs of one token that may be queued or drawn at a time."""
    queue: PositiveInt = 20_000
    """Jobs of all that may be queued or drawn at a time."""
    max_pixels: PositiveInt = 1024 * 1024
    """Width times height of a picture that may be asked for."""
    max_steps: PositiveInt = 150
    """Denoising steps that may be asked for."""
    max_count: PositiveInt = 16
    """Pictures that one job may ask for."""
    max_prompt: PositiveInt = 4000
    """Characters that a prompt, or a negative prompt, may have."""
    max_upload: PositiveInt = 16 * 2**20
    """Bytes that the body of a request may have."""
    max_upload_pixels: PositiveInt = 16_000_000
    """Pixels that a picture to begin with, or a mask, may have."""
    lease: PositiveFloat = 15
    """Seconds without a sign of life after which the jobs of another server are taken over."""
    attempts: PositiveInt = 10
    """Servers that may die while they draw a job, before it counts as failed."""
    drain: NonNegativeFloat = 30
    """Seconds that a server told to end goes on with what it is drawing, before it hands that back to the queue."""
    log_prompts: bool = False
    """Write prompts into the log."""

    @model_validator(mode="after")
    def _some_model(self) -> Self:
        if not self.models:
            raise ValueError("there is no model; name one")
        return self


class TokenConfig(StageConfig):
    """Make, list and remove the tokens that let others use the server."""

    action: Annotated[Literal["add", "list", "remove"], Argument()]
    """add prints a new token, which is stored nowhere; list shows the names; remove takes one's rights away."""
    name: Annotated[str, Argument(), Field(pattern=r"^[\w.@-]{0,64}$")] = ""
    """Whom the token is for: letters, digits, dots, dashes."""
    out: Data = Path("served")
    """The server's folder."""
    database: str | None = None
    """The server's database, as `limner serve` takes it."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if bool(self.name) == (self.action == "list"):
            raise ValueError("list takes no name" if self.name else f"{self.action} needs a name")
        return self
