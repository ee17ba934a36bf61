"""Two servers that share a queue, of which one is killed, or told of what the other draws."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from serving import PROMPT, Queue, Server, serving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")
JOBS = 24


def test_two_servers_share_a_queue_and_one_dies(postgresql: str, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "served"
    sets = Queue(postgresql).sets(data)
    with serving(data, folder, sets=sets) as one, serving(data, folder, sets=sets) as other:
        bodies = [{"prompt": PROMPT, "steps": 40, "seed": number} for number in range(JOBS)]
        jobs = [(one, other)[i % 2].call("POST", "/v1/jobs", body)[1]["id"] for i, body in enumerate(bodies)]
        until = time.monotonic() + 60
        while {line["event"] for line in _of(one)} & {"job ended"} == set():
            assert time.monotonic() < until
            time.sleep(0.01)
        elsewhere = one.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": 16})[1]["id"]
        one.kill()
        assert other.call("DELETE", f"/v1/jobs/{elsewhere}")[1]["state"] == "cancelled"
        ended = [other.ended(job) for job in jobs]
        assert {job["state"] for job in ended} == {"done"}
        assert [job["images"][0]["seed"] for job in ended] == list(range(JOBS))
        assert all(other.call("GET", job["images"][0]["url"])[0] == 200 for job in ended)
        ends = Counter(line["job"] for line in other.lines() if line["event"] == "job ended")
        assert max(ends.values()) == 1
        both = [{line["job"] for line in _of(server) if line["event"] == "job ended"} for server in (one, other)]
        assert all(both), "both drew"


def test_a_job_of_another_server_is_cancelled_and_followed(postgresql: str, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "served"
    sets = Queue(postgresql).sets(data)
    with serving(data, folder, sets=sets) as one:
        job = one.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": 16})[1]["id"]
        next(one.events(job))
        with serving(data, folder, sets=sets) as other:
            names = []
            for name, _ in other.events(job):
                names.append(name)
                if names.count("step") == 2:
                    assert other.call("DELETE", f"/v1/jobs/{job}")[1]["state"] == "cancelled"
            assert names[-1] == "cancelled"
            after = one.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1})[1]["id"]
            assert one.ended(after)["state"] == "done"
            before = -1.0
            while (steps := one.steps()) > before:
                before = steps
                time.sleep(1)
            assert steps < 150 * 16, "it heard of it"


def _of(server: Server) -> list[dict[str, object]]:
    return server.lines(own=True)
