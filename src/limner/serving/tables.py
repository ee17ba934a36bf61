"""The tables of the queue: jobs, their pictures, and who may use the server."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import JSON

State = Literal["queued", "running", "done", "failed", "cancelled"]
OPEN: tuple[State, ...] = ("queued", "running")
"""States of a job that has not ended."""


class Base(DeclarativeBase):
    """The tables."""


class JobRow(Base):
    """A request for one or more pictures of one prompt."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_state", "state", "number"),
        Index("jobs_by_shape", "state", "shape", "number"),
        Index("jobs_by_owner", "owner", "created"),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    """Its place in the order of all jobs."""
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str]
    """Name of the token that it came with; empty without."""
    model: Mapped[str]
    shape: Mapped[str]
    """Equal for jobs that may share a batch."""
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What was asked for, as `schemas.JobRequest`, with its seed."""
    pictures: Mapped[int]
    steps: Mapped[int]
    """Of all its pictures together."""
    step: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(default="queued")
    error: Mapped[str | None] = mapped_column(default=None)
    fault: Mapped[bool] = mapped_column(default=False)
    """Whether the server is to blame for the error, and not what was asked for."""
    worker: Mapped[str | None] = mapped_column(default=None)
    lease: Mapped[float | None] = mapped_column(default=None)
    attempts: Mapped[int] = mapped_column(default=0)
    created: Mapped[float]
    started: Mapped[float | None] = mapped_column(default=None)
    finished: Mapped[float | None] = mapped_column(default=None)


class ImageRow(Base):
    """A picture of a job."""

    __tablename__ = "images"
    __table_args__ = (UniqueConstraint("job", "number"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    """From 0: its seed is the job's plus this."""
    file: Mapped[str]
    """Below the server's folder."""
    width: Mapped[int]
    height: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Of the file."""
    score: Mapped[float | None] = mapped_column(default=None)
    """How well it fits the prompt, where the best of several are kept."""


class TokenRow(Base):
    """Somebody who may use the server."""

    __tablename__ = "tokens"

    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    """SHA-256 of the token, which has 256 random bits and so needs no salt."""
    created: Mapped[float]
