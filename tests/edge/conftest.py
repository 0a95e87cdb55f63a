"""Counters: one for each test, and one that a whole module shares where no request may change anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
import structlog
import uvloop

from holdfast import observe
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.contract.backends import BACKENDS, PostgresSession
from tests.edge.counter import Counter, facing, fill, serving, settings_on
from tests.servers.postgres import require_postgres


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The edge is tested on the loop that it is served on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _logs_as_served() -> Iterator[None]:
    """Log as a served shop does: tracebacks are short and hold no values."""
    observe.configure_logs("console", "info")
    yield
    structlog.reset_defaults()


@pytest.fixture
def settings(database_url: str) -> Settings:
    return settings_on(database_url)


@pytest.fixture
async def counter(start_system: StartSystem) -> AsyncIterator[Counter]:
    """A shop with its workers; a test that asks for it runs once on each database."""
    system = await start_system()
    await fill(system)
    async with facing(system) as counter:
        yield counter


@pytest.fixture
async def idle(start_system: StartSystem) -> AsyncIterator[Counter]:
    """A shop without workers: its messages stay where they were written."""
    system = await start_system(work=False)
    await fill(system)
    async with facing(system) as counter:
        yield counter


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=sorted(BACKENDS))
async def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_session: PostgresSession
) -> AsyncIterator[Counter]:
    """A shop without workers for a whole module, once on each database."""
    if request.param == "postgresql":
        require_postgres()
    with BACKENDS[request.param](tmp_path_factory.mktemp("shared"), postgres_session) as url:
        async with serving(settings_on(url)) as counter:
            await fill(counter.system, units=1_000)
            yield counter


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Counter]:
    """A shop without workers for a whole module, where the database does not matter."""
    async with serving(settings_on(f"sqlite:///{tmp_path_factory.mktemp('shared')}/holdfast.db")) as counter:
        await fill(counter.system, units=1_000)
        yield counter
