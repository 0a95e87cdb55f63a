"""PostgreSQL with asyncpg: a bounded pool, time-outs on the server's side, and a refusal of settings that lose data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import URL, event, exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from holdfast.db.border import translate
from holdfast.db.database import Dialect, SingleTx, Tx, committing, outlast, quietly
from holdfast.errors import InvalidSettings, Unavailable, UnsafeDatabase

# A setting that is off gives an acknowledgement before the row is on the disk.
DURABILITY = ("fsync", "synchronous_commit")
CONNECT_TIMEOUT_S = 10.0
POOL_TIMEOUT_S = 15.0


class PostgresDatabase:
    """A PostgreSQL database; transactions run at READ COMMITTED."""

    dialect: Dialect = "postgresql"

    def __init__(self, engine: AsyncEngine, url: URL) -> None:
        self._engine = engine
        self.url = url
        self.singles = 0  # statements of `single` that are under way; who waits for rest looks here

    @classmethod
    async def open(cls, url: URL, *, pool_size: int = 10, statement_timeout_ms: int = 30_000) -> PostgresDatabase:
        """Connect and check durability.

        Raises `Unavailable` when the server cannot be reached, `UnsafeDatabase` when `fsync` or `synchronous_commit`
        is off, `InvalidSettings` when asyncpg is not installed.
        """
        url = url.set(drivername="postgresql+asyncpg")
        try:
            engine = create_async_engine(
                url,
                pool_size=pool_size,
                max_overflow=0,
                hide_parameters=True,
                pool_timeout=POOL_TIMEOUT_S,
                # For SQLAlchemy every connection is in autocommit, once and for all: BEGIN and COMMIT are asked of the
                # driver, so that statements may go to it directly (`Prepared`), and what SQLAlchemy runs falls into the
                # transaction that is open. Nothing has to be set when a connection is taken, or rolled back when it is
                # given back (`_give_back` looks).
                isolation_level="AUTOCOMMIT",
                pool_reset_on_return=None,
                connect_args={
                    "timeout": CONNECT_TIMEOUT_S,
                    # The client waits a little longer than the server's own time-out, so that its reply can arrive.
                    "command_timeout": statement_timeout_ms / 1_000 + 5,
                    "server_settings": {
                        "application_name": "holdfast",
                        "statement_timeout": str(statement_timeout_ms),
                        "lock_timeout": str(statement_timeout_ms),
                        "idle_in_transaction_session_timeout": str(statement_timeout_ms * 2),
                        "jit": "off",
                    },
                },
            )
        except ModuleNotFoundError as error:
            raise InvalidSettings("database: PostgreSQL needs asyncpg; pip install 'holdfast[postgres]'") from error
        event.listen(engine.sync_engine, "checkout", _refuse_dead)
        database = cls(engine, url)
        try:
            await database._refuse_unsafe()
        except BaseException as error:
            await engine.dispose()
            if isinstance(error, Unavailable):
                where = url.set(drivername="postgresql").render_as_string(hide_password=True)
                raise Unavailable(f"HOLDFAST_DATABASE: {where} does not answer: {error.detail}") from error
            if type(error).__module__.startswith(("asyncpg.", "sqlalchemy.")):
                said = str(getattr(error, "orig", error)).partition("\n")[0].rpartition(">: ")[2]
                raise InvalidSettings(f"HOLDFAST_DATABASE: PostgreSQL refuses the connection: {said}") from error
            raise
        return database

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        async with self._connection() as connection:
            opened = await _begin(connection)
            async with committing(Tx(connection, "postgresql"), opened.commit, opened.rollback) as tx:
                yield tx

    @asynccontextmanager
    async def single(self) -> AsyncIterator[Tx]:
        self.singles += 1
        try:
            async with self._connection() as connection:
                tx = SingleTx(connection, "postgresql")
                yield tx
                tx.refuse_void()
                tx.committed()
        finally:
            self.singles -= 1

    @asynccontextmanager
    async def read(self, *, snapshot: bool = False) -> AsyncIterator[Tx]:
        async with self._connection() as connection:
            if not snapshot:
                yield Tx(connection, "postgresql")  # without BEGIN and ROLLBACK round trips around one SELECT
                return
            opened = await _begin(connection, isolation="repeatable_read", readonly=True)
            try:
                yield Tx(connection, "postgresql")
            finally:
                await outlast(quietly(opened.rollback))

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        try:
            connection = await self._engine.connect()
        except Exception as error:
            raise translate(error) from error
        try:
            yield connection
        finally:
            await _give_back(connection)

    async def _refuse_unsafe(self) -> None:
        async with self.read() as tx:
            for name in DURABILITY:
                value = (await tx.execute(text("SELECT current_setting(:name)"), {"name": name})).scalar_one()
                if value == "off":
                    raise UnsafeDatabase(
                        f"PostgreSQL runs with {name}=off: a crash would lose orders that were acknowledged. "
                        f"Set {name}=on (server, database or role) and start again"
                    )


def _refuse_dead(connection: Any, _record: Any, _proxy: Any) -> None:
    """Hand out no connection that the server has closed while it lay in the pool: one means all of that age."""
    if connection.driver_connection.is_closed():
        raise exc.InvalidatePoolError


async def _begin(connection: AsyncConnection, **kind: Any) -> Any:
    driver: Any = (await connection.get_raw_connection()).driver_connection
    try:
        opened = driver.transaction(**kind)
        await opened.start()
    except BaseException as error:
        # Cancelled or failed here, the driver does not know whether BEGIN arrived: this connection is of no more use.
        driver.terminate()
        if isinstance(error, Exception):
            raise translate(error) from error
        raise
    return opened


async def _give_back(connection: AsyncConnection) -> None:
    """Return a connection to the pool, unless the driver knows that it is dead or still in a transaction."""
    if not connection.invalidated:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if driver.is_closed() or driver.is_in_transaction():
            await outlast(_discard(connection, driver))
            return
    await connection.close()  # nothing is reset, so nothing waits here that could be cancelled


async def _discard(connection: AsyncConnection, driver: Any) -> None:
    if not driver.is_closed():
        driver.terminate()
    await connection.invalidate()
    await connection.close()
