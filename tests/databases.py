"""A PostgreSQL server for tests, where Debian's package is installed; it belongs to a user without root's rights."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def _program(name: str) -> str:
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    return found


@contextmanager
def postgres() -> Iterator[str]:
    """Start one, and yield its URL without a database. Skips where there is none."""
    initdb, server = _program("initdb"), _program("postgres")
    pytest.importorskip("psycopg")
    user: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pg") as place:
        if os.geteuid() == 0:  # as which it refuses to run
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(place, nobody.pw_uid, nobody.pw_gid)
        data = Path(place) / "data"
        subprocess.run(
            [initdb, "-D", data, "-A", "trust", "-U", "limner", "-E", "UTF8", "--locale=C"],
            check=True,
            capture_output=True,
            cwd=place,
            **user,
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = ["-D", data, "-k", place, "-h", "127.0.0.1", "-p", str(port), "-F"]
        with (Path(place) / "log").open("wb") as log:
            process = subprocess.Popen([server, *map(str, options)], stdout=log, stderr=log, cwd=place, **user)
        try:
            _wait(port, process)
            yield f"postgresql://limner@127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    until = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"postgresql://limner@127.0.0.1:{port}/postgres").close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)


def new_database(url: str, name: str) -> str:
    """An empty database of that server. -> its URL."""
    import psycopg

    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{url}/{name}"
