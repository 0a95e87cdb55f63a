"""Fixtures every test may use: an empty database per test on each backend, and a running system on it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from holdfast.bootstrap import System, migrate_all, running
from holdfast.clock import Clock, SystemClock
from holdfast.settings import (
    DatabaseSettings,
    HttpSettings,
    MessagingSettings,
    OrdersSettings,
    PaymentsSettings,
    Secret,
    Settings,
)
from tests.contract.backends import BACKENDS, PostgresSession
from tests.servers.postgres import require_postgres

WAIT_S = 20.0


@pytest.fixture(scope="session")
def postgres_session() -> Iterator[PostgresSession]:
    session = PostgresSession()
    yield session
    session.stop()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HOLDFAST_"):
            monkeypatch.delenv(name)


@pytest.fixture(params=sorted(BACKENDS))
def database_url(request: pytest.FixtureRequest, tmp_path: Path, postgres_session: PostgresSession) -> Iterator[str]:
    """The URL of an empty database; a test that asks for it runs once on each backend."""
    if request.param == "postgresql":
        require_postgres()
    with BACKENDS[request.param](tmp_path, postgres_session) as url:
        yield url


def quick_settings(url: str) -> Settings:
    """Settings of a system that retries and sweeps in fractions of a second, so that tests wait little."""
    return Settings(
        database=DatabaseSettings(url=url),
        messaging=MessagingSettings(
            poll_ms=200, lease_ms=2_000, local_interval_ms=10, durable_interval_ms=50, durable_interval_ms_max=200
        ),
        orders=OrdersSettings(time_out_ms=60_000, sweep_ms=500),
        payments=PaymentsSettings(sandbox=True, sandbox_secret=Secret("sandbox-secret-for-tests"), sweep_ms=500),
        http=HttpSettings(token_secret=Secret("token-secret-for-tests-of-32-bytes!!")),
    )


@pytest.fixture
def settings(database_url: str) -> Settings:
    return quick_settings(database_url)


class StartSystem(Protocol):
    """Starts a system on the test's database; it is stopped when the test ends."""

    async def __call__(
        self, settings: Settings | None = None, *, work: bool = True, clock: Clock | None = None
    ) -> System: ...


@pytest.fixture
async def start_system(settings: Settings) -> AsyncIterator[StartSystem]:
    default = settings
    async with AsyncExitStack() as stack:

        async def start(settings: Settings | None = None, *, work: bool = True, clock: Clock | None = None) -> System:
            chosen = settings or default
            await migrate_all(chosen)
            system = await stack.enter_async_context(running(chosen, clock=clock))
            if work:
                system.work()
            return system

        yield start


@pytest.fixture
async def system(start_system: StartSystem) -> System:
    """A running system with its workers."""
    return await start_system()


def with_orders(settings: Settings, **changes: int) -> Settings:
    """The settings with other `[orders]` values."""
    return msgspec.structs.replace(settings, orders=msgspec.structs.replace(settings.orders, **changes))


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, wait_s: float = WAIT_S) -> None:
    """Poll until the condition holds; fails with `what` when the deadline passes first."""
    clock = SystemClock()
    until = clock.monotonic() + wait_s
    while not await condition():
        assert clock.monotonic() < until, f"not within {wait_s} s: {what}"
        await clock.sleep(0.01)
