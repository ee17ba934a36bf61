"""A server killed at random moments under load, and begun again: every accepted job ends once.

`PYTHONPATH=tests python tests/e2e/test_serve_kills.py ROUNDS` does it as often as is wanted, with 20 clients.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from serving import PROMPT, Queue, Server
from tiny import tiny_model

PATIENT = ("attempts=1000",)  # the kills come from outside, however often they hit the same job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")


def load(server: Server, clients: int, seconds: float, rng: random.Random) -> list[str]:
    """Kill a server after so long, while clients begin jobs. -> those that it acknowledged."""
    accepted: list[str] = []
    over = threading.Event()

    def client(seed: int) -> None:
        own = random.Random(seed)
        while not over.is_set():
            body = {"prompt": PROMPT, "steps": own.randint(1, 8), "n": own.randint(1, 2), "seed": own.randrange(2**32)}
            status, job = server.call("POST", "/v1/jobs", body)
            if status == 202:
                accepted.append(job["id"])
            elif status == 0:
                return
            time.sleep(own.uniform(0, 0.2))

    threads = [threading.Thread(target=client, args=(rng.random(),)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    server.kill()
    over.set()
    for thread in threads:
        thread.join()
    return accepted


def kill_under_load(queue: Queue, folder: Path, rounds: int, clients: int, rng: random.Random) -> int:
    """Assert what the module says, for so many kills of servers that share a data folder. -> the jobs accepted."""
    model = tiny_model(folder / "tiny")
    data = folder / "served"
    accepted: list[str] = []
    for number in range(rounds):
        # Sometimes before the model is loaded, so that a start in the middle of things is killed too
        server = queue.begin(data, model, sets=PATIENT)
        if rng.random() < 0.8:
            server.ready()
        accepted += load(server, clients, rng.uniform(0, 1.5), rng)
        print(f"kill {number + 1}: {len(accepted)} jobs accepted so far", flush=True)
    with queue.serving(data, model, sets=PATIENT) as last:
        for job in accepted:
            ended = last.ended(job, 600)
            assert ended["state"] == "done", ended
            assert len(ended["images"]) == ended["settings"]["n"]
            assert all((last.call("GET", image["url"])[0]) == 200 for image in ended["images"])
    check_once(queue, data, accepted, last)
    return len(accepted)


def check_once(queue: Queue, data: Path, accepted: list[str], server: Server) -> None:
    """None lost, none twice, the database sound, and no file that nobody knows."""
    if queue.postgres is None:
        assert queue.rows(data, "PRAGMA integrity_check") == [("ok",)]
    states = dict(queue.rows(data, "SELECT id, state FROM jobs"))
    files = [file for (file,) in queue.rows(data, "SELECT file FROM images")]
    twice = queue.rows(data, "SELECT job, number FROM images GROUP BY job, number HAVING count(*) > 1")
    assert set(accepted) <= states.keys()
    assert twice == []
    assert len(files) == len(set(files))
    done = {job for job, state in states.items() if state == "done"}
    there = {
        file.relative_to(data).as_posix() for file in (data / "pictures").rglob("*.png") if file.parent.name in done
    }
    assert there <= set(files), "a picture that was drawn twice"
    ends = Counter(line["job"] for line in server.lines() if line["event"] == "job ended")
    assert max(ends.values()) == 1


def test_killed_under_load_every_accepted_job_ends_once(queue: Queue, tmp_path: Path) -> None:
    assert kill_under_load(queue, tmp_path, rounds=3, clients=8, rng=random.Random(0)) > 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(
            f"{kill_under_load(Queue(None), Path(place), int(sys.argv[1]), 20, random.Random())} jobs, each ended once"
        )
