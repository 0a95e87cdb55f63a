"""An open database with one small table, on each backend or on PostgreSQL alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from holdfast.db.connect import connect
from holdfast.db.database import Database
from holdfast.settings import DatabaseSettings
from tests.contract.backends import PostgresSession
from tests.db.jars import make_jars
from tests.servers.postgres import PostgresServer, require_postgres


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open database with the table of jars."""
    opened = await connect(DatabaseSettings(url=database_url, pool_size=3))
    await make_jars(opened)
    yield opened
    await opened.close()


@pytest.fixture
def postgres_server(postgres_session: PostgresSession) -> PostgresServer:
    require_postgres()
    return postgres_session.server


@pytest.fixture
def postgres_name(postgres_server: PostgresServer) -> Iterator[str]:
    """The name of an empty PostgreSQL database."""
    name = postgres_server.create_database()
    yield name
    postgres_server.drop_database(name)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, postgres_name: str) -> str:
    return postgres_server.url(postgres_name)


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL of this module's own, to be crashed."""
    require_postgres()
    with PostgresServer() as server:
        yield server
