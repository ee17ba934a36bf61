"""A real server in a process of its own, of a tiny model, which tests may kill."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

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


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


@contextmanager
def serving(data: Path, *models: object, sets: tuple[str, ...] = (), host: str = "127.0.0.1") -> Iterator[Server]:
    """A server that is ready, and killed at the end."""
    server = Server(data, *models, sets=sets, host=host)
    try:
        yield server.ready()
    finally:
        if server.process.is_alive():
            server.kill()
