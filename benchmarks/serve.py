"""What the server costs: pictures a second and latency at 1, 8 and 32 clients, against the bare engine.

    python benchmarks/serve.py --name my-machine

The built-in model draws with 4 steps. The engine draws for one client as the client asks, one picture after the other,
and for several all pictures in one call, so that it is as fast as it can be. Also: how long GET takes meanwhile, from
start to ready against a cold `limner generate`, and the idle server's memory. Prints a line for each figure and, last,
all of them as JSON; the same goes to results/serve/NAME.json.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from record import keep

import limner
from limner import settings

os.environ.update(settings.WAITING)  # as the command line does, so that the engine's threads wait alike

PROMPT = "A golden retriever playing in a field."
STEPS = 4
CLIENTS = (1, 8, 32)
ROUNDS = 5
LIMNER = [sys.executable, "-c", "from limner.cli import main; main()"]


class Server:
    """`limner serve builtin` at a free port."""

    def __init__(self, data: Path) -> None:
        """Start it, and wait until it listens."""
        started = time.perf_counter()
        with data.with_suffix(".log").open("wb") as log:
            call = [*LIMNER, "serve", "builtin", "--port", "0", "--data", str(data)]
            self.process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        if not found:
            sys.exit("The server did not start; see its log.")
        self.port = int(found[1])
        self.started = started

    def ready(self) -> float:
        """Wait until it draws. -> seconds since its start."""
        while self.request("GET", "/readyz")[0] != 200:
            time.sleep(0.02)
        return time.perf_counter() - self.started

    def page(self) -> None:
        """Wait until people can draw too, which takes seconds of its own."""
        while b"Limner is starting" in urllib.request.urlopen(f"http://127.0.0.1:{self.port}/page/").read():
            time.sleep(0.1)

    def end(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, float]:
        """Status and seconds of a request of its own connection."""
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, time.perf_counter() - started

    def memory(self) -> float | None:
        """MiB that it occupies; None where the system does not tell."""
        file = Path(f"/proc/{self.process.pid}/status")
        found = re.search(r"VmRSS:\s+(\d+) kB", file.read_text()) if file.exists() else None
        return round(int(found[1]) / 1024, 1) if found else None


def bare(model: Any, pictures: int, clients: int) -> float:
    """Seconds that the engine alone takes: one call a picture for one client, or else one call for all."""
    started = time.perf_counter()
    n = 1 if clients == 1 else pictures
    for seed in range(0, pictures, n):
        model(PROMPT, steps=STEPS, seed=seed, n=n)
    return time.perf_counter() - started


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Of times, in milliseconds."""
    return {f"p{q}_ms": round(float(np.percentile(seconds, q)) * 1000, 1) for q in (50, 95, 99)}


def load(server: Server, clients: int, pictures: int, *, own: bool = False) -> tuple[float, list[float]]:
    """Draw so many pictures for so many clients at once, each waiting for its own; with `own` settings no two alike.

    -> the seconds of all together, and of each.
    """
    numbers = iter(range(pictures))
    lock = threading.Lock()
    drawn: list[float] = []
    statuses: set[int] = set()

    def draw() -> None:
        while True:
            with lock:
                seed = next(numbers, None)
            if seed is None:
                return
            body = {"prompt": PROMPT, "seed": seed, "steps": STEPS, **({"guidance": 2 + seed / 100} if own else {})}
            status, seconds = server.request("POST", "/v1/images/generations", body)
            statuses.add(status)
            drawn.append(seconds)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        ends = [threads.submit(draw) for _ in range(clients)]
    taken = time.perf_counter() - started
    for end in ends:
        end.result()
    if statuses != {200} or len(drawn) != pictures:
        sys.exit(f"The server answered {statuses} and drew {len(drawn)} of {pictures}.")
    return taken, drawn


def compared(server: Server, model: Any, clients: int, pictures: int, *, own: bool = False) -> dict[str, float]:
    """Server and engine in turns, since a machine's speed drifts, and the median turn of each, since others use it."""
    each = pictures // ROUNDS
    engine, served, latencies = [], [], []
    for _ in range(ROUNDS):
        engine.append(bare(model, each, clients))
        taken, drawn = load(server, clients, each, own=own)
        served.append(taken)
        latencies += drawn
    return {
        "pictures_a_second": round(each / median(served), 2),
        "engine_pictures_a_second": round(each / median(engine), 2),
        "share_of_engine": round(median(engine) / median(served), 3),
        **percentiles(latencies),
    }


def looks(server: Server, count: int) -> dict[str, dict[str, float]]:
    """How long routes take to answer, asked ten times a second, while pictures are drawn for 8 clients."""
    seconds: dict[str, list[float]] = {"/v1/jobs?limit=10": [], "/v1/models": [], "/readyz": []}
    with ThreadPoolExecutor(1) as thread:
        drawing = thread.submit(load, server, 8, count // 4)
        for _, path in zip(range(count), itertools.cycle(seconds)):
            time.sleep(0.1)
            seconds[path].append(server.request("GET", path)[1])
    drawing.result()
    return {path: percentiles(taken) for path, taken in seconds.items()}


def cold_generate(folder: Path) -> float:
    """Seconds of a command that draws one picture."""
    started = time.perf_counter()
    call = [*LIMNER, "generate", PROMPT, "--set", f"steps={STEPS}", "--out", str(folder)]
    subprocess.run(call, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, and keep the result under the machine's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the machine, for the file of results")
    parser.add_argument("--pictures", type=int, default=320, help="pictures drawn for each figure (default 320)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures: dict[str, Any] = {"cold_generate_s": round(cold_generate(Path(place) / "pictures"), 2)}
        server = Server(Path(place) / "served")
        try:
            figures["ready_s"] = round(server.ready(), 2)
            server.page()
            figures["idle_mib"] = server.memory()
            print(figures, flush=True)
            model = limner.load("builtin")
            bare(model, 2, 8)
            load(server, 8, 16)
            for n in CLIENTS:
                figures[f"clients_{n}"] = compared(server, model, n, arguments.pictures)
                print(f"clients {n}: {figures[f'clients_{n}']}", flush=True)
            figures["clients_8_own_settings"] = compared(server, model, 8, arguments.pictures, own=True)
            figures["get_while_drawing"] = looks(server, arguments.pictures)
        finally:
            server.end()
    for name, value in figures.items():
        print(f"{name:<26} {value}")
    keep("serve", arguments.name, limner=limner.__version__, pictures=arguments.pictures, steps=STEPS, **figures)


if __name__ == "__main__":
    main()
