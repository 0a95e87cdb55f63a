"""Every kind of handle that may hold a user's transaction, driven in one way: one class each, one row in HANDLES."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import aiosqlite
import asyncpg
import psycopg
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from holdfast.bootstrap import System
from holdfast.messaging.enlist import ConnectionInbox, ConnectionOutbox
from holdfast.messaging.injection import Incoming
from tests.conftest import eventually
from tests.contract.notes import EXCHANGE, KEY, Note, plainly

WRITE = "INSERT INTO test_ledger (text) VALUES ('own row')"
SAVE, UNDO, RELEASE = "SAVEPOINT before", "ROLLBACK TO SAVEPOINT before", "RELEASE SAVEPOINT before"
BEGIN = "BEGIN"

T = TypeVar("T")


class Handle:
    """One connection or session of the user's own, and what he does with it; `begin` comes first."""

    raw: Any

    def __init__(self, url: str, outbox: ConnectionOutbox, inbox: ConnectionInbox) -> None:
        self.url = make_url(url)
        self.outbox = outbox
        self.inbox = inbox

    @property
    def dsn(self) -> str:
        return self.url.set(drivername="postgresql").render_as_string(hide_password=False)

    @property
    def path(self) -> str:
        assert self.url.database is not None
        return self.url.database

    async def open(self, *, autocommit: bool = False) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def begin(self) -> None:
        """Nothing, where the first statement begins."""

    async def commit(self) -> None:
        await self.raw.commit()

    async def rollback(self) -> None:
        await self.raw.rollback()

    async def run(self, sql: str) -> None:
        raise NotImplementedError

    async def write(self) -> None:
        """Write a business row."""
        await self.run(WRITE)

    async def save(self) -> None:
        await self.run(SAVE)

    async def undo(self) -> None:
        """Roll back to the savepoint."""
        await self.run(UNDO)

    async def release(self) -> None:
        """Keep what was done since the savepoint, for as long as the transaction lasts."""
        await self.run(RELEASE)

    async def add(self, body: str, *, exchange: str = EXCHANGE, key: str = KEY, **options: Any) -> None:
        await self.outbox.add(self.raw, exchange, key, Note(body), **options)

    async def add_wrongly(self) -> None:
        """Hand it to the method for handles of the other sort."""
        self.outbox.add_sync(self.raw, EXCHANGE, KEY, Note("never"))

    async def add_all(self, drafts: Any) -> None:
        await self.outbox.add_all(self.raw, drafts)

    async def cancel(self, *keys: str) -> int:
        return await self.outbox.cancel(self.raw, *keys)

    async def move(self, *keys: str, **when: int) -> int:
        return await self.outbox.move(self.raw, *keys, **when)

    async def first(self, consumer: str, message_id: str) -> bool:
        return await self.inbox.first(self.raw, consumer, message_id)


class Blocking(Handle):
    """A handle that blocks lives in a thread of its own, which has no event loop."""

    def __init__(self, url: str, outbox: ConnectionOutbox, inbox: ConnectionInbox) -> None:
        super().__init__(url, outbox, inbox)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def there(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def open(self, *, autocommit: bool = False) -> None:
        await self.there(lambda: self.connect(autocommit))

    async def close(self) -> None:
        await self.there(self.disconnect)
        self._thread.shutdown()

    def connect(self, autocommit: bool) -> None:
        raise NotImplementedError

    def disconnect(self) -> None:
        self.raw.close()

    async def commit(self) -> None:
        await self.there(self.raw.commit)

    async def rollback(self) -> None:
        await self.there(self.raw.rollback)

    async def run(self, sql: str) -> None:
        await self.there(lambda: self.raw.execute(sql))

    async def add(self, body: str, *, exchange: str = EXCHANGE, key: str = KEY, **options: Any) -> None:
        await self.there(lambda: self.outbox.add_sync(self.raw, exchange, key, Note(body), **options))

    async def add_wrongly(self) -> None:
        await self.outbox.add(self.raw, EXCHANGE, KEY, Note("never"))

    async def add_all(self, drafts: Any) -> None:
        await self.there(lambda: self.outbox.add_all_sync(self.raw, drafts))

    async def cancel(self, *keys: str) -> int:
        return await self.there(lambda: self.outbox.cancel_sync(self.raw, *keys))

    async def move(self, *keys: str, **when: int) -> int:
        return await self.there(lambda: self.outbox.move_sync(self.raw, *keys, **when))

    async def first(self, consumer: str, message_id: str) -> bool:
        return await self.there(lambda: self.inbox.first_sync(self.raw, consumer, message_id))


class OnAsyncConnection(Handle):
    driver: ClassVar[dict[str, str]] = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    engine: AsyncEngine
    nested: Any

    def make(self, engine: AsyncEngine) -> AsyncConnection | AsyncSession:
        return engine.connect()

    async def open(self, *, autocommit: bool = False) -> None:
        self.engine = create_async_engine(self.url.set(drivername=self.driver[self.url.get_backend_name()]))
        engine = self.engine.execution_options(isolation_level="AUTOCOMMIT") if autocommit else self.engine
        self.raw = self.make(engine)
        await self.raw.__aenter__()

    async def close(self) -> None:
        await self.raw.close()
        await self.engine.dispose()

    async def run(self, sql: str) -> None:
        await self.raw.execute(text(sql))

    async def save(self) -> None:
        self.nested = await self.raw.begin_nested()

    async def undo(self) -> None:
        await self.nested.rollback()

    async def release(self) -> None:
        await self.nested.commit()


class OnAsyncSession(OnAsyncConnection):
    def make(self, engine: AsyncEngine) -> AsyncSession:
        return AsyncSession(engine)


class OnAsyncSessionWithPsycopg(OnAsyncSession):
    driver: ClassVar[dict[str, str]] = {"postgresql": "postgresql+psycopg"}


class OnConnection(Blocking):
    engine: Engine
    nested: Any

    def make(self, engine: Engine) -> Any:
        return engine.connect()

    def connect(self, autocommit: bool) -> None:
        url: URL = self.url.set(drivername=self.url.get_backend_name().replace("postgresql", "postgresql+psycopg"))
        self.engine = create_engine(url)
        self.raw = self.make(self.engine.execution_options(isolation_level="AUTOCOMMIT") if autocommit else self.engine)

    def disconnect(self) -> None:
        self.raw.close()
        self.engine.dispose()

    async def run(self, sql: str) -> None:
        await self.there(lambda: self.raw.execute(text(sql)))

    async def save(self) -> None:
        self.nested = await self.there(self.raw.begin_nested)

    async def undo(self) -> None:
        await self.there(self.nested.rollback)

    async def release(self) -> None:
        await self.there(self.nested.commit)


class OnSession(OnConnection):
    def make(self, engine: Engine) -> Session:
        return Session(engine)


class OnAsyncpg(Handle):
    transaction: Any

    async def open(self, *, autocommit: bool = False) -> None:
        self.raw = await asyncpg.connect(self.dsn)

    async def close(self) -> None:
        await self.raw.close()

    async def begin(self) -> None:
        self.transaction = self.raw.transaction()
        await self.transaction.start()

    async def commit(self) -> None:
        await self.transaction.commit()

    async def rollback(self) -> None:
        await self.transaction.rollback()

    async def run(self, sql: str) -> None:
        await self.raw.execute(sql)


class OnAsyncPsycopg(Handle):
    async def open(self, *, autocommit: bool = False) -> None:
        self.raw = await psycopg.AsyncConnection.connect(self.dsn, autocommit=autocommit)

    async def close(self) -> None:
        await self.raw.close()

    async def run(self, sql: str) -> None:
        await self.raw.execute(sql)


class OnPsycopg(Blocking):
    def connect(self, autocommit: bool) -> None:
        self.raw = psycopg.connect(self.dsn, autocommit=autocommit, row_factory=psycopg.rows.dict_row)


class OnSqlite3(Blocking):
    def connect(self, autocommit: bool) -> None:
        self.raw = sqlite3.connect(self.path, isolation_level=None if autocommit else "DEFERRED")


class OnSqlite3WithBegin(Blocking):
    """The caller says BEGIN himself; rows come as dicts, whatever we would rather have."""

    def connect(self, autocommit: bool) -> None:
        self.raw = sqlite3.connect(self.path, isolation_level=None)
        self.raw.row_factory = lambda cursor, row: dict(zip([each[0] for each in cursor.description], row, strict=True))

    async def begin(self) -> None:
        await self.run(BEGIN)


class OnAiosqlite(Handle):
    async def open(self, *, autocommit: bool = False) -> None:
        self.raw = await aiosqlite.connect(self.path, isolation_level=None if autocommit else "DEFERRED")
        self.raw.row_factory = sqlite3.Row

    async def close(self) -> None:
        await self.raw.close()

    async def run(self, sql: str) -> None:
        await (await self.raw.execute(sql)).close()


HANDLES: dict[str, tuple[str, type[Handle]]] = {
    "sqlite-AsyncConnection": ("sqlite", OnAsyncConnection),
    "sqlite-AsyncSession": ("sqlite", OnAsyncSession),
    "sqlite-Connection": ("sqlite", OnConnection),
    "sqlite-Session": ("sqlite", OnSession),
    "sqlite3": ("sqlite", OnSqlite3),
    "sqlite3-BEGIN": ("sqlite", OnSqlite3WithBegin),
    "aiosqlite": ("sqlite", OnAiosqlite),
    "postgresql-AsyncConnection": ("postgresql", OnAsyncConnection),
    "postgresql-AsyncSession": ("postgresql", OnAsyncSession),
    "postgresql-AsyncSession-psycopg": ("postgresql", OnAsyncSessionWithPsycopg),
    "postgresql-Connection": ("postgresql", OnConnection),
    "postgresql-Session": ("postgresql", OnSession),
    "asyncpg": ("postgresql", OnAsyncpg),
    "psycopg-async": ("postgresql", OnAsyncPsycopg),
    "psycopg": ("postgresql", OnPsycopg),
}
"""Name -> backend, and the class that drives it."""

OpenHandle = Callable[..., Awaitable[Handle]]


class Heard:
    """A running listener, and what it was told."""

    def __init__(self, system: System) -> None:
        self.notes: list[str] = []
        system.listen(plainly(self._hear))

    async def _hear(self, incoming: Incoming) -> None:
        self.notes.append(incoming.body.text)

    async def become(self, *wanted: str) -> None:
        async def reached() -> bool:
            return len(self.notes) >= len(wanted)

        await eventually(reached, f"the listener heard {wanted}")
        assert sorted(self.notes) == sorted(wanted)
