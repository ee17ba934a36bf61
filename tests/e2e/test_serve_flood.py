"""More jobs than are drawn in a while, over HTTP: who comes too late is told, the list stays quick, and none is lost.

`PYTHONPATH=tests python tests/e2e/test_serve_flood.py JOBS` queues as many as are wanted.
"""

from __future__ import annotations

import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from serving import PROMPT, Queue, Server
from tiny import tiny_model

CLIENTS = 8
LISTS = 20
LONG = 5000  # pictures of a job that keeps a server busy meanwhile


def seconds(server: Server, path: str) -> float:
    """How long an answer of a route takes, in the middle of several."""
    taken = []
    for _ in range(LISTS):
        started = time.perf_counter()
        assert server.call("GET", path)[0] == 200
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def flood(queue: Queue, model: Path, data: Path, jobs: int) -> dict[str, float]:
    """Assert what the module says, for so many jobs. -> seconds that lists and a look at a job take when all wait."""
    servers = 1 if queue.postgres is None else 2
    with queue.serving(data, model, sets=(f"queue={jobs + servers}", f"max_count={LONG}")) as server:
        long = [server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": LONG}) for _ in range(servers)]
        while len(server.call("GET", "/v1/jobs?state=running")[1]["jobs"]) < servers:
            time.sleep(0.05)

        def add(seed: int) -> str:
            status, job = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1, "guidance": 1, "seed": seed})
            assert status == 202, job
            return str(job["id"])

        with ThreadPoolExecutor(CLIENTS) as clients:
            accepted = list(clients.map(add, range(jobs)))
        status, answer = server.call("POST", "/v1/jobs", {"prompt": PROMPT})
        assert (status, "come back later" in answer["error"]["message"]) == (503, True)
        assert retry_after(server) > 0
        queued = server.call("GET", "/v1/jobs?state=queued&limit=1")[1]["jobs"]
        assert [job["place"] for job in queued] == [jobs - 1]
        figures = {
            "newest": seconds(server, "/v1/jobs"),
            "200 queued": seconds(server, "/v1/jobs?state=queued&limit=200"),
            "one": seconds(server, f"/v1/jobs/{accepted[-1]}"),
        }
        server.kill()
    with queue.serving(data, model, sets=(f"max_count={LONG}",)) as server:
        for _, job in long:
            server.call("DELETE", f"/v1/jobs/{job['id']}")
        for id_ in accepted[-2 * CLIENTS :]:  # clients queued these at about the same time
            assert server.ended(id_, 1200)["state"] == "done"
        states = dict(queue.rows(data, "SELECT id, state FROM jobs"))
        assert {states[id_] for id_ in accepted} == {"done"}
    return figures


def retry_after(server: Server) -> int:
    """Seconds that the refusal of a job names."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/jobs", b'{"prompt": "A dog."}', headers)
    try:
        urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        return int(error.headers["Retry-After"])
    raise AssertionError("it was accepted")


def test_more_jobs_than_are_drawn_in_a_while(queue: Queue, folder: Path, tmp_path: Path) -> None:
    flood(queue, folder, tmp_path / "served", 120)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(flood(Queue(None), tiny_model(Path(place) / "tiny"), Path(place) / "served", int(sys.argv[1])))
