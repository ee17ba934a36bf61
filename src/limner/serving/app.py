"""The HTTP application: routes, their gate, and the signs of life that machines look at."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from limner import __version__
from limner.serving import a1111_api, door, jobs_api, openai_api
from limner.serving.access import BEARER, Gate, is_this_machine
from limner.serving.answers import answer_errors, documented
from limner.serving.metrics import Metrics
from limner.serving.service import Service

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def create_app(service: Service) -> FastAPI:
    """The application for a service, which it starts and stops. What is mounted into it stands behind the same gate."""
    config = service.config

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            async with door.opening(app, service):
                yield
        finally:
            await run_in_threadpool(service.stop)

    app = FastAPI(
        title="Limner",
        version=__version__,
        description="Turns captions into pictures. Errors have one body: `error.message` says what to do.",
        lifespan=life,
        docs_url=None,  # its page would ask another host
        redoc_url=None,
    )
    app.state.service = service
    answer_errors(app)
    for part in (jobs_api, openai_api, a1111_api):
        app.include_router(part.routes, dependencies=[BEARER])
    _add_signs_of_life(app, service)
    local = is_this_machine(config.host)
    needs_token = not local if config.require_tokens is None else config.require_tokens
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=config.max_upload)
    app.add_middleware(Gate, store=service.store, local=local, needs_token=needs_token, most=config.max_upload)
    app.add_middleware(Observer, metrics=service.metrics)
    return app


def _add_signs_of_life(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["server"], response_class=PlainTextResponse, responses=documented(json=False))
    async def alive() -> str:
        """The process answers."""
        return "ok"

    @app.get("/readyz", tags=["server"], response_class=PlainTextResponse, responses=documented(json=False))
    def ready() -> str:
        """The first model is loaded and the database answers."""
        service.store.ping()
        if service.draining or not service.worker.ready:
            raise HTTPException(503, "The server is not ready, or about to end.", {"Retry-After": "1"})
        return "ok"

    @app.get(
        "/metrics",
        tags=["server"],
        response_class=PlainTextResponse,
        responses=documented(json=False),
        dependencies=[BEARER],
    )
    def metrics() -> PlainTextResponse:
        """Figures for Prometheus."""
        page = service.metrics.render(service.store.counts(), len(service.shelf.loaded))
        return PlainTextResponse(page)


class Observer:
    """Measures each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")  # not the path, which may be anything
            method = scope["method"] if scope["method"] in METHODS else "other"  # which may be anything too
            self.metrics.requests.labels(method, route, status).observe(seconds)
