"""The backends that pass the contract suite: one row each. A new transport or database is one more row here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.postgres import PostgresServer


class PostgresSession:
    """The test session's own PostgreSQL, started when the first test wants it."""

    def __init__(self) -> None:
        self._server: PostgresServer | None = None

    @property
    def server(self) -> PostgresServer:
        if self._server is None:
            self._server = PostgresServer()
            self._server.start()
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


@contextmanager
def sqlite(folder: Path, _: PostgresSession) -> Iterator[str]:
    """A SQLite file of its own."""
    yield f"sqlite:///{folder}/holdfast.db"


@contextmanager
def postgresql(_: Path, session: PostgresSession) -> Iterator[str]:
    """A PostgreSQL database of its own."""
    name = session.server.create_database()
    try:
        yield session.server.url(name)
    finally:
        session.server.drop_database(name)


BACKENDS = {"sqlite": sqlite, "postgresql": postgresql}
"""Name -> where its empty database is."""
