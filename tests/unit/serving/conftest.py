"""The queue in SQLite and in PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from databases import new_database, postgres

pytest.importorskip("sqlalchemy")
from limner.serving.store import Store

_names = (f"limner{number}" for number in itertools.count())


@pytest.fixture(scope="package")
def server() -> Iterator[str]:
    """A PostgreSQL server."""
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens the same database again and again, as several servers would."""
    url = new_database(request.getfixturevalue("server"), next(_names)) if request.param == "postgresql" else None
    return lambda: Store(tmp_path, url)


@pytest.fixture
def store(opened: Callable[[], Store]) -> Iterator[Store]:
    """An empty queue."""
    store = opened()
    yield store
    store.close()
