"""How the server says no: one body for all errors, and what each of our exceptions becomes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from limner.errors import UserError
from limner.serving.schemas import Error, ErrorBody, JobView
from limner.serving.service import Draining, UnknownModel
from limner.serving.store import QueueFull


class Failed(Exception):
    """A job that somebody waited for ended without its pictures."""

    def __init__(self, job: JobView) -> None:
        super().__init__(job.error or "The job was cancelled.")
        self.job = job


log = logging.getLogger("limner.serve")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY = 5  # seconds, where nothing better is known


def documented(*codes: int, json: bool = True) -> dict[int | str, dict[str, Any]]:
    """The errors of a route for the OpenAPI document: those of every route, and its own.

    `json` is false for a route that answers something else where all is well, which FastAPI would say of errors too.
    """
    named = {"schema": {"$ref": "#/components/schemas/Error"}}
    body = {"model": Error} if json else {"content": {"application/json": named}}
    said = {
        400: "The body is no form or JSON.",
        401: "A token is needed, or this one is not known.",
        403: "The request comes from another site's page.",
        404: "There is no such thing here.",
        409: "The job was cancelled.",
        413: "The body is larger than is allowed.",
        415: "The body is of another type than is read here.",
        422: "A setting does not fit; the message says which.",
        429: "Too many jobs of this token.",
        500: "The job failed through a fault of the server.",
        503: "The server is about to end, has too much to do, or lacks its disk or database.",
    }
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {
        code: {**body, "description": said[code]} | ({"headers": retry} if code in {429, 503} else {})
        for code in sorted({401, 403, 422, 503, *codes})
    }


def refusal(
    status: int, message: str, headers: Mapping[str, str] | None = None, code: str | None = None
) -> JSONResponse:
    """An answer that says no, in a sentence."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    # What is quoted of a request may be no Unicode
    message = message.encode("utf-8", "backslashreplace").decode()
    body = Error(error=ErrorBody(message=message, type=kind, code=code))
    return JSONResponse(body.model_dump(), status, headers)


def no_database(error: SQLAlchemyError) -> JSONResponse:
    """An answer for who needs the database when it is away."""
    log.error("the database does not answer", exc_info=error)
    return refusal(503, "The server's database does not answer; try again.", _retry(RETRY))


def no_disk(error: OSError) -> str:
    """What who needs the disk is told when it can't be used, without the name of the file."""
    log.error("the disk can't be used", exc_info=error)
    return f"The server's disk can't be used ({(error.strerror or 'no reason known').lower()}); try again later."


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def answer_errors(app: FastAPI) -> None:
    """Answer each exception with its sentence."""

    @app.exception_handler(UserError)
    def user_error(_: Request, error: UserError) -> JSONResponse:
        if isinstance(error, UnknownModel):
            return refusal(404, str(error), code="model_not_found")
        return refusal(422, str(error))

    @app.exception_handler(QueueFull)
    def full(_: Request, error: QueueFull) -> JSONResponse:
        return refusal(429 if error.own else 503, str(error), _retry(error.seconds))

    @app.exception_handler(Draining)
    def draining(_: Request, error: Draining) -> JSONResponse:
        return refusal(503, str(error), _retry(RETRY))

    @app.exception_handler(Failed)
    def failed(_: Request, error: Failed) -> JSONResponse:
        status = 409 if error.job.state == "cancelled" else 500 if error.job.fault else 422
        return refusal(status, str(error), {"X-Limner-Job": error.job.id})

    @app.exception_handler(SQLAlchemyError)
    def database(_: Request, error: SQLAlchemyError) -> JSONResponse:
        return no_database(error)

    @app.exception_handler(OSError)
    def disk(_: Request, error: OSError) -> JSONResponse:
        return refusal(503, no_disk(error), _retry(RETRY))

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)  # of a job that another's request comes to
    def invalid(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = first["loc"][1:] if isinstance(error, RequestValidationError) else first["loc"]
        name = ".".join(map(str, where))
        return refusal(422, f"{name or 'The request'}: {first['msg'].removeprefix('Value error, ')}.")

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    def fault(_: Request, error: Exception) -> JSONResponse:
        return refusal(500, "Limner failed; the server's log says more.")
