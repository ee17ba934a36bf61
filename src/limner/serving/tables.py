"""The tables of the queue and their rows: jobs, their pictures, and who may use the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

State = Literal["queued", "running", "done", "failed", "cancelled"]
OPEN: tuple[State, ...] = ("queued", "running")
"""States of a job that has not ended."""


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A request for one or more pictures of one prompt."""

    number: int = 0
    """Its place in the order of all jobs, from 1; 0 as long as it is not stored."""
    id: str
    owner: str
    """Name of the token that it came with; empty without."""
    model: str
    shape: str
    """Equal for jobs that may share a batch."""
    settings: dict[str, Any]
    """What was asked for, as `schemas.JobRequest`, with its seed."""
    pictures: int
    steps: int
    """Of all its pictures together; one each where only the model's pipeline knows how many it takes."""
    step: int = 0
    state: str = "queued"
    error: str | None = None
    fault: bool = False
    """Whether the server is to blame for the error, and not what was asked for."""
    worker: str | None = None
    lease: float | None = None
    attempts: int = 0
    created: float
    started: float | None = None
    finished: float | None = None


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """A picture of a job."""

    id: str
    job: str
    number: int
    """From 0: its seed is the job's plus this."""
    file: str
    """Below the server's folder."""
    width: int
    height: int
    bytes: int = 0
    """Of the file."""
    score: float | None = None
    """How well it fits the prompt, where the best of several are kept."""


TABLES = MetaData()

JOBS = Table(
    "jobs",
    TABLES,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String, unique=True, nullable=False),
    Column("owner", String, nullable=False),
    Column("model", String, nullable=False),
    Column("shape", String, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("pictures", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("error", String),
    Column("fault", Boolean, nullable=False),
    Column("worker", String),
    Column("lease", Double),
    Column("attempts", Integer, nullable=False),
    Column("created", Double, nullable=False),
    Column("started", Double),
    Column("finished", Double),
    Index("jobs_by_state", "state", "number"),
    Index("jobs_by_shape", "state", "shape", "number"),
    Index("jobs_by_owner", "owner", "created"),
    sqlite_autoincrement=True,
)

IMAGES = Table(
    "images",
    TABLES,
    Column("id", String, primary_key=True),
    Column("job", String, ForeignKey("jobs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("file", String, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    Column("score", Double),
    UniqueConstraint("job", "number"),
)

TOKENS = Table(
    "tokens",
    TABLES,
    Column("name", String, primary_key=True),
    Column("digest", String, unique=True, nullable=False),
    Column("created", Double, nullable=False),
)
"""Who may use the server; `digest` is the SHA-256 of the token, which has 256 random bits and so needs no salt."""
