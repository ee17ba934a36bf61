"""What the OpenAPI document says is what the server does: schemathesis sends what it thinks of.

`PYTHONPATH=tests python tests/e2e/test_serve_schema.py CASES` sends as many as are wanted to each route.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from serving import Queue
from tiny import tiny_model

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
LIMITS = ("max_pixels=1024", "max_steps=4", "max_count=2")  # so that what is accepted is soon drawn


@pytest.fixture(scope="module")
def url(queue: Queue, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a tiny model."""
    with queue.serving(tmp_path_factory.mktemp("schema") / "served", folder, sets=LIMITS) as server:
        yield server.url


def send(url: str, examples: int) -> int:
    """Send so many cases to each route, and check the answers. -> cases sent."""
    sent = 0
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        cases = operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=examples < 100,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def check(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
        print(operation.label, sent, flush=True)
    return sent


def test_answers_are_as_documented(url: str) -> None:
    assert send(url, 12) >= 200


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    with Queue(None).serving(place / "served", tiny_model(place / "tiny"), sets=LIMITS) as running:
        print(f"{send(running.url, int(sys.argv[1]))} cases")
