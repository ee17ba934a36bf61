"""The database behind the queue: SQLite in the server's folder, or PostgreSQL by URL."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event, inspect, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.schema import CreateColumn

from limner.errors import ConfigError
from limner.serving.tables import TABLES

log = logging.getLogger("limner.serve")

FILE = "jobs.sqlite"
QUIET: dict[str, Any] = {"hide_parameters": True}  # which are prompts, in what an error says
SCHEMA_LOCK = 7_546_637  # of PostgreSQL's advisory locks, while tables are made


def opened(folder: Path, url: str | None) -> Engine:
    """The database with all its tables; a damaged one is moved aside first, which the log says.

    Raises ConfigError where there is no right to it, or for a bad URL.
    """
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        _move_damaged(folder / FILE)
    engine = _sqlite(folder / FILE) if url is None else _by_url(url)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SCHEMA_LOCK})
            TABLES.create_all(connection)
            _add_new_columns(connection)
    except DatabaseError as error:
        reason = str(error.orig).strip().split("\n")[0]
        place = "in --data" if url is None else "behind --set database"
        raise ConfigError(f"The database {place} can't be used ({reason}); mend that or name another.") from None
    return engine


def _add_new_columns(connection: Connection) -> None:
    """Those that the tables of an earlier version lack; each may be NULL or has a default."""
    for table in TABLES.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                words = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {words}")


def _sqlite(file: Path) -> Engine:
    """SQLite as a queue wants it: readers never wait, writers do for each other, and a commit is on the disk unless it
    need not be durable."""
    engine = create_engine(f"sqlite:///{file}", connect_args={"timeout": 30, "check_same_thread": False}, **QUIET)

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # pysqlite would begin late and as a reader
        for pragma in ("journal_mode=WAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("write", True):
            connection.exec_driver_sql("BEGIN")
            return
        level = "FULL" if options.get("durable", True) else "NORMAL"
        connection.connection.driver_connection.execute(f"PRAGMA synchronous={level}")  # type: ignore[union-attr]
        # A reader that becomes a writer fails where another wrote since; so writers say so at once
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _by_url(url: str) -> Engine:
    """PostgreSQL. Raises ConfigError for another URL."""
    if not url.startswith(("postgresql://", "postgres://")):
        raise ConfigError("The database must be postgresql://USER:PASSWORD@HOST/NAME; leave it out for SQLite.")
    try:
        engine = create_engine(
            "postgresql+psycopg://" + url.split("://", 1)[1], pool_pre_ping=True, pool_size=20, **QUIET
        )
    except ModuleNotFoundError:
        raise ConfigError("PostgreSQL needs psycopg; install with: pip install 'limner[postgres]'.") from None
    except (ArgumentError, ValueError):
        raise ConfigError(
            "The URL of the database can't be read; write postgresql://USER:PASSWORD@HOST/NAME."
        ) from None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("durable", True):
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")

    return engine


def _move_damaged(file: Path) -> None:
    """Move a database that can't be read out of the way, so that a new one can begin."""
    if not file.exists():
        return
    engine = _sqlite(file)
    try:
        with engine.connect() as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    except OperationalError as error:  # no right to read it, or locked: not damaged
        raise ConfigError(
            f"The database {file} can't be opened ({error.orig}); mend that or name another --data."
        ) from None
    except DatabaseError:
        verdict = "damaged"
    finally:
        engine.dispose()
    if verdict == "ok":
        return
    aside = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    file.rename(aside)
    for suffix in ("-wal", "-shm"):
        if (beside := file.with_name(file.name + suffix)).exists():
            beside.rename(aside.with_name(aside.name + suffix))
    log.warning("the database was damaged and moved to %s", aside)
