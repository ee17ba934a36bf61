"""Who may use the server: tokens, and pages of other sites, which may not."""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from limner.serving.answers import no_database, refusal
from limner.serving.store import Store
from limner.serving.tokens import digest

OPEN_TO_ALL = ("/healthz", "/readyz")


@dataclass(frozen=True)
class Client:
    """Who sent a request."""

    owner: str = ""
    """Name of the token; empty without."""

    @property
    def scope(self) -> str | None:
        """Whose jobs the client may see: those of its token, or all where it needed none."""
        return self.owner or None


def client_of(request: Request) -> Client:
    """Who sent the request, as `Gate` found out."""
    client = request.scope["client of limner"]
    assert isinstance(client, Client)
    return client


async def _client(request: Request) -> Client:  # async, or else FastAPI asks a thread for it
    return client_of(request)


# Names the scheme in the OpenAPI document; `Gate` does the work, also for what is mounted beside the routes
BEARER = Depends(HTTPBearer(auto_error=False, description="A token of `limner token add`, if the server wants one."))
From = Annotated[Client, Depends(_client)]


def is_this_machine(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Lets requests in: with a token where one is needed, and none that another site's page sends."""

    def __init__(self, app: ASGIApp, store: Store, *, local: bool, needs_token: bool, most: int) -> None:
        """`local` where the server listens at this machine's own address; a body may have `most` bytes."""
        self.app, self.store, self.most = app, store, most
        self.local, self.needs_token = local, needs_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if why := self._foreign(headers):
            await refusal(403, why)(scope, receive, send)
            return
        token = _token(headers.get("authorization", ""))
        try:
            name = await run_in_threadpool(self.store.token_of, digest(token)) if token else None
        except SQLAlchemyError as error:
            await no_database(error)(scope, receive, send)
            return
        # Where none is needed an unknown one does no harm: some clients insist on sending something
        if name is None and self.needs_token and scope["path"] not in OPEN_TO_ALL:
            what = "The token is not known here" if token else "A token is needed"
            basic = {"WWW-Authenticate": 'Basic realm="limner"'}
            await refusal(401, f"{what}; make one with limner token add.", basic)(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.most:  # Starlette sees to what comes in chunks
            await refusal(413, f"The body is larger than the {self.most} bytes allowed here.")(scope, receive, send)
            return
        scope["client of limner"] = Client(name or "")
        await self.app(scope, receive, send)

    def _foreign(self, headers: Headers) -> str | None:
        """Why a browser's request comes from a page that is not the server's own."""
        host = headers.get("host", "")
        if self.local and not self.needs_token and not is_this_machine(_name(host)):
            return "The server is asked by a name that is not this machine's; use 127.0.0.1 or localhost."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "Pages of other sites may not use this server."
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _token(header: str) -> str:
    """The token of an Authorization header: as Bearer, or as the password of Basic; empty without."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""
