"""Fixtures: a test that asks for a handle runs once for every kind of it, on a system that knows notes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from holdfast.bootstrap import System
from holdfast.messaging.enlist import ConnectionInbox, ConnectionOutbox
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.contract.backends import BACKENDS, PostgresSession
from tests.contract.enlist.handles import HANDLES, Handle, OpenHandle
from tests.contract.notes import TYPES, Ledger, office, with_messaging
from tests.servers.postgres import require_postgres


@pytest.fixture(params=sorted(HANDLES))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def database_url(kind: str, tmp_path: Path, postgres_session: PostgresSession) -> Iterator[str]:
    """The URL of an empty database on the backend of this kind of handle."""
    backend, _ = HANDLES[kind]
    if backend == "postgresql":
        require_postgres()
    with BACKENDS[backend](tmp_path, postgres_session) as url:
        yield url


@pytest.fixture
def poll_ms() -> int:
    return 200


@pytest.fixture
async def system(start_system: StartSystem, settings: Settings, poll_ms: int) -> System:
    system = await office(start_system, with_messaging(settings, poll_ms=poll_ms))
    await Ledger.of(system)
    return system


@pytest.fixture
async def open_handle(kind: str, system: System, database_url: str) -> AsyncIterator[OpenHandle]:
    """Opens handles of this kind on the system's database; each is closed when the test ends."""
    outbox, inbox = ConnectionOutbox(TYPES, clock=system.clock), ConnectionInbox(clock=system.clock)
    async with AsyncExitStack() as stack:

        async def open_one(*, autocommit: bool = False, outbox: ConnectionOutbox = outbox) -> Handle:
            handle = HANDLES[kind][1](database_url, outbox, inbox)
            await handle.open(autocommit=autocommit)
            stack.push_async_callback(handle.close)
            return handle

        yield open_one
