"""Limner's own routes: jobs, their events and their pictures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from limner.serving.access import From
from limner.serving.answers import documented
from limner.serving.schemas import JobList, JobRequest, JobView
from limner.serving.service import Served
from limner.serving.tables import State

EVENTS = """What happens to the job until it ends, beginning with how it stands now: `queued` (place), `step` (step,
steps), `preview` (jpeg, small, in base64), `image` (as in the job), and last `done`, `failed` or `cancelled` (the
whole job). Who asks again is told how it stands."""
PNG = {"description": "The picture.", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}

HTML = {"description": "The page.", "content": {"text/html": {"schema": {"type": "string"}}}}
STILL = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-popups"
"""What a report may do in a browser: look, and nothing else."""

routes = APIRouter(prefix="/v1", tags=["jobs"])


def found(id: str, service: Served, client: From) -> JobView:
    """The job of a path."""
    job = service.get(id, client.scope)
    if job is None:
        raise HTTPException(404, "There is no such job; GET /v1/jobs lists those there are.")
    return job


Found = Annotated[JobView, Depends(found)]


@routes.post("/jobs", status_code=202, responses=documented(400, 404, 413, 429))
def begin(request: JobRequest, service: Served, client: From) -> JobView:
    """Queue a job. It is on disk before this answers, and will be drawn whatever happens to the server."""
    return service.submit(request, client.owner)


@routes.get("/jobs", responses=documented())
def list_jobs(
    service: Served,
    client: From,
    state: Annotated[State | None, Query(description="Only those in this state.")] = None,
    before: Annotated[int | None, Query(ge=1, lt=2**63, description="Only those of a lower number.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobList:
    """The newest jobs, newest first."""
    return JobList(jobs=service.listed(client.scope, state=state, before=before, limit=limit))


@routes.get("/jobs/{id}", responses=documented(404))
def get_job(job: Found) -> JobView:
    """How a job stands."""
    return job


@routes.delete("/jobs/{id}", responses=documented(404))
def cancel(job: Found, service: Served) -> JobView:
    """Cancel a job: at once while it is queued, within one step while it is drawn. One that has ended stays."""
    cancelled = service.cancel(job.id)
    assert cancelled is not None
    return cancelled


@routes.get(
    "/jobs/{id}/events", response_class=EventSourceResponse, responses=documented(404, json=False), description=EVENTS
)
async def events(job: Found, service: Served) -> AsyncIterator[ServerSentEvent]:
    """See EVENTS."""
    async for event in service.follow(job.id):
        yield ServerSentEvent(event=event.name, data=event.data)


@routes.get("/images/{id}", response_class=FileResponse, responses=documented(404, json=False) | {200: PNG})
def image(id: str, service: Served, client: From) -> FileResponse:
    """A picture, with all its settings in its metadata."""
    file = service.file(id, client.scope)
    if file is None:
        raise HTTPException(404, "There is no such picture.")
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    return FileResponse(file, media_type="image/png", headers=headers)


@routes.get("/reports/{model:path}", response_class=FileResponse, responses=documented(404, json=False) | {200: HTML})
def report(model: str, service: Served) -> FileResponse:
    """The page that `limner evaluate` wrote of a model; /v1/models says which have one."""
    file = service.reports.get(service.model_name(model))
    if file is None:
        raise HTTPException(404, f"There is no report of {model}; name one of limner evaluate in the setting reports.")
    return FileResponse(file, media_type="text/html", headers={"Content-Security-Policy": STILL})
