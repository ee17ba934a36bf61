"""Real servers in processes of their own, of a tiny model, which tests may kill; alone, or two that share a queue."""

from __future__ import annotations

import http.client
import itertools
import json
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from databases import new_database

READY = 120  # seconds that a start may take on a busy machine
PROMPT = "A golden retriever playing in a field."
PRELOADED = [
    "limner.cli",
    "limner.generation.model",
    "limner.serving.app",
    "limner.stages.serve",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "uvicorn",
]


def _command(arguments: list[str], out: Path, log: Path) -> None:
    """`limner` with these arguments, in a process of its own."""
    from limner import cli

    for number, file, mode in ((1, out, os.O_TRUNC), (2, log, os.O_APPEND)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | mode), number)
    sys.argv = ["limner", *arguments]
    cli.main()


class Server:
    """`limner serve` with some arguments, at a free port."""

    def __init__(self, data: Path, *models: object, sets: tuple[str, ...] = (), host: str = "127.0.0.1") -> None:
        """Start it, and wait until it listens. Each has a log of its own beside `data`."""
        self.data = data
        self.log, out = (data.with_name(f"{data.name}-{uuid4().hex}.{end}") for end in ("log", "out"))
        options = [word for one in sets for word in ("--set", one)]
        call = ["serve", *map(str, models), "--port", "0", "--data", str(data), "--host", host, *options]
        context = multiprocessing.get_context("forkserver")  # which loads the libraries once
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(target=_command, args=(call, out, self.log))
        self.process.start()
        until = time.monotonic() + READY
        while not (found := re.search(r":(\d+)\n", out.read_text() if out.exists() else "")):
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{found[1]}"

    def ready(self) -> Server:
        """Wait until it draws."""
        until = time.monotonic() + READY
        while self.call("GET", "/readyz")[0] != 200:
            assert time.monotonic() < until, self.log.read_text()
            assert self.process.is_alive(), self.log.read_text()
            time.sleep(0.05)
        return self

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        """Status and answer of a request; 0 where the server was gone before it answered."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        except (OSError, http.client.HTTPException):
            return 0, None
        return status, _parsed(content)

    def events(self, job: str) -> Iterator[tuple[str, Any]]:
        """What /v1/jobs/{id}/events says until it ends."""
        with urllib.request.urlopen(f"{self.url}/v1/jobs/{job}/events", timeout=120) as stream:
            name = ""
            for line in map(bytes.decode, stream):
                if line.startswith("event: "):
                    name = line.removeprefix("event: ").strip()
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

    def ended(self, job: str, seconds: float = 120) -> Any:
        """A job once it has ended."""
        until = time.monotonic() + seconds
        while (answer := self.call("GET", f"/v1/jobs/{job}"))[1]["state"] in {"queued", "running"}:
            assert time.monotonic() < until, (answer, self.log.read_text())
            time.sleep(0.05)
        return answer[1]

    def steps(self) -> float:
        """Denoising steps that it took so far."""
        found = re.search(r"^limner_steps_total (.*)$", Server.call(self, "GET", "/metrics")[1].decode(), re.MULTILINE)
        assert found
        return float(found[1])

    def kill(self, how: int = signal.SIGKILL) -> int | None:
        """End it. -> its exit code."""
        assert self.process.pid is not None
        os.kill(self.process.pid, how)
        self.process.join(60)
        return self.process.exitcode

    def lines(self, *, own: bool = False) -> list[dict[str, Any]]:
        """What it, or all servers of its data folder, logged, without lines cut off by a kill."""
        logs = [self.log] if own else sorted(self.data.parent.glob(f"{self.data.name}-*.log"))
        texts = [text for log in logs for text in log.read_text().splitlines()]
        return [line for text in texts if isinstance(line := _parsed(text.encode()), dict)]


class Pair(Server):
    """Two servers that share a data folder and a database; each request goes to the one or the other, in turn."""

    def __init__(self, data: Path, *models: object, sets: tuple[str, ...], host: str = "127.0.0.1") -> None:
        super().__init__(data, *models, sets=sets, host=host)
        self.other = Server(data, *models, sets=sets, host=host)
        self._turns = itertools.cycle([super().call, self.other.call])

    def ready(self) -> Pair:
        """Wait until both draw."""
        until = time.monotonic() + READY
        for call in (super().call, self.other.call):
            while call("GET", "/readyz")[0] != 200:
                assert time.monotonic() < until, self.log.read_text() + self.other.log.read_text()
                time.sleep(0.05)
        return self

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        return next(self._turns)(method, path, body, token)

    def steps(self) -> float:
        return super().steps() + self.other.steps()

    def kill(self, how: int = signal.SIGKILL) -> int | None:
        """End both, the second a moment later. -> the exit code of the first."""
        code = super().kill(how) if self.process.is_alive() else self.process.exitcode
        if self.other.process.is_alive():
            self.other.kill(how)
        return code


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


@contextmanager
def serving(data: Path, *models: object, sets: tuple[str, ...] = (), host: str = "127.0.0.1") -> Iterator[Server]:
    """A server that is ready, and killed at the end."""
    with _ending(Server(data, *models, sets=sets, host=host)) as server:
        yield server.ready()


@contextmanager
def _ending(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        if server.process.is_alive() or (isinstance(server, Pair) and server.other.process.is_alive()):
            server.kill()


class Queue:
    """How the tests of this run keep their queues: one server with SQLite, or two that share a PostgreSQL."""

    def __init__(self, postgres: str | None) -> None:
        """`postgres` is the URL of a PostgreSQL server."""
        self.postgres = postgres
        self._databases: dict[Path, str] = {}

    def sets(self, data: Path) -> tuple[str, ...]:
        """Settings by which servers, and `limner token`, find the queue that belongs to a data folder."""
        if self.postgres is None:
            return ()
        if data not in self._databases:
            self._databases[data] = new_database(self.postgres, f"limner-{uuid4().hex}")
        return (f"database={self._databases[data]}",)

    def begin(self, data: Path, *models: object, sets: tuple[str, ...] = (), host: str = "127.0.0.1") -> Server:
        """The servers, which listen but need not be ready."""
        kind = Server if self.postgres is None else Pair
        return kind(data, *models, sets=(*sets, *self.sets(data)), host=host)

    @contextmanager
    def serving(
        self, data: Path, *models: object, sets: tuple[str, ...] = (), host: str = "127.0.0.1"
    ) -> Iterator[Server]:
        """The servers, which are ready, and killed at the end."""
        with _ending(self.begin(data, *models, sets=sets, host=host)) as server:
            yield server.ready()

    def rows(self, data: Path, query: str) -> list[tuple[Any, ...]]:
        """What the database of a data folder answers."""
        with self._connected(data) as connection:
            return list(connection.execute(query).fetchall())

    def change(self, data: Path, statement: str) -> None:
        """Change something in it."""
        with self._connected(data) as connection:
            connection.execute(statement)
            connection.commit()

    def _connected(self, data: Path) -> AbstractContextManager[Any]:
        if self.postgres is None:
            return closing(sqlite3.connect(data / "jobs.sqlite"))
        import psycopg

        return closing(psycopg.connect(self._databases[data]))
