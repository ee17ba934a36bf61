"""A real server in a process of its own, of a tiny model, which tests may kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMNER = [sys.executable, "-c", "from limner.cli import main; main()"]
READY = 120  # seconds that a start may take on a busy machine
PROMPT = "A golden retriever playing in a field."


class Server:
    """`limner serve` with some arguments; `port` is a free one."""

    def __init__(self, data: Path, *models: object, sets: tuple[str, ...] = (), host: str = "127.0.0.1") -> None:
        """Start it, and wait until it listens. What it logs goes on in the same file for the same `data`."""
        self.data = data
        self.log = data.with_name(data.name + ".log")
        options = [word for one in sets for word in ("--set", one)]
        call = [*LIMNER, "serve", *map(str, models), "--port", "0", "--data", str(data), "--host", host, *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        assert found, self.log.read_text()
        self.url = f"http://127.0.0.1:{found[1]}"

    def ready(self) -> Server:
        """Wait until it draws."""
        until = time.monotonic() + READY
        while self.call("GET", "/readyz")[0] != 200:
            assert time.monotonic() < until, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
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
        except OSError:
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

    def kill(self, how: int = signal.SIGKILL) -> int:
        """End it. -> its exit code."""
        self.process.send_signal(how)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def lines(self) -> list[dict[str, Any]]:
        """What it logged, also before an earlier kill, without lines cut off by one."""
        return [line for text in self.log.read_text().splitlines() if isinstance(line := _parsed(text.encode()), dict)]


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
        if server.process.poll() is None:
            server.kill()
