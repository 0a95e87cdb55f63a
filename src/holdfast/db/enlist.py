"""Enlist: take part in a transaction that somebody else opened, on his own connection or session.

`enlist` shows the handle as a `Tx`, so every statement of ours runs on it unchanged and shares its fate. Nothing here
commits or rolls back; a handle in autocommit is refused, since there would be no fate to share. On a blocking handle
the statements' coroutines never suspend, so `run_sync` needs no event loop to run them.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar

from sqlalchemy import Connection, CursorResult, Executable, event, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session, SessionTransaction

from holdfast.db.border import translate
from holdfast.db.database import Dialect, Parameters, Tx, awaited, outlast
from holdfast.db.sqlite import refuse_other_process
from holdfast.errors import InvalidInput, SchemaOutdated

T = TypeVar("T")

_FILES = "PRAGMA database_list"  # number, name and file; `main` comes first
_WAITING = "holdfast_after_commit"  # in a session's `info`: the callbacks of its transaction


async def enlist(handle: object) -> Tx:
    """The open transaction of an async handle.

    Takes a SQLAlchemy AsyncSession or AsyncConnection, an asyncpg or aiosqlite connection, or a psycopg
    AsyncConnection. Raises `InvalidInput` for anything else and for a handle without an open transaction,
    `DatabaseInUse` for a SQLite file that another process of ours writes.
    """
    enlisting = _find(handle, _ASYNC, _BLOCKING, "it blocks; call the method whose name ends in _sync")
    tx = await enlisting(handle)
    await _refuse_other_process(tx)
    return tx


def enlist_sync(handle: object) -> Tx:
    """The open transaction of a blocking handle.

    Takes a SQLAlchemy Session or Connection, or a psycopg or sqlite3 connection. Raises as `enlist` does.
    """
    enlisting = _find(handle, _BLOCKING, _ASYNC, "it is async; await the method without _sync in its name")
    tx = enlisting(handle)
    run_sync(_refuse_other_process(tx))
    return tx


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that talks to nothing but a blocking handle; there need be no event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("the work waited for an event loop, which a blocking handle does not have")


class _Enlisted(Tx):
    """Somebody else's transaction."""

    blocks: ClassVar[bool] = False
    copies = False  # COPY is not for us to begin on any handle that may come

    async def _run(self, statement: Awaitable[T]) -> T:
        try:
            if self.dialect == "sqlite" and not self.blocks:
                # The statement runs in a thread that cannot be stopped; who is cancelled may roll back at once.
                return await outlast(awaited(statement))
            return await statement
        except Exception as error:
            ours = _translated(error)
            raise ours from ours.__cause__


# -- SQLAlchemy -------------------------------------------------------------------------------------------------------


class _OnSqlAlchemy(_Enlisted):
    """Statements go through SQLAlchemy itself: it begins by itself, and knows the paramstyle of every driver.

    `session` is whose commit is heard; a bare connection has no event after its commit, so there callbacks are dropped.
    """

    takes_text = False

    def __init__(self, connection: Any, dialect: Dialect, session: Session | None) -> None:
        super().__init__(connection, dialect)
        self._session = session

    def on_commit(self, callback: Callable[[], None]) -> None:
        if self._session is not None:
            _after_commit(self._session, callback)


class _OnSqlAlchemyBlocking(_OnSqlAlchemy):
    blocks = True

    async def execute(self, statement: Executable, parameters: Parameters | None = None) -> CursorResult[Any]:
        return await self._run(self._execute(statement, parameters))

    async def _execute(self, statement: Executable, parameters: Parameters | None) -> CursorResult[Any]:
        connection: Any = self.connection
        result: CursorResult[Any] = connection.execute(statement, parameters)
        return result


async def _async_session(handle: Any) -> Tx:
    return await _async_connection(await handle.connection(), handle.sync_session)


async def _async_scoped_session(handle: Any) -> Tx:
    return await _async_session(handle())


async def _async_connection(handle: AsyncConnection, session: Session | None = None) -> Tx:
    if not handle.in_transaction():
        await handle.begin()  # as its first statement would
    return _checked(_OnSqlAlchemy(handle, _dialect(handle), session), handle.sync_connection)


def _session(handle: Any) -> Tx:
    return _connection(handle.connection(), handle)


def _scoped_session(handle: Any) -> Tx:
    return _session(handle())


def _connection(handle: Connection, session: Session | None = None) -> Tx:
    if not handle.in_transaction():
        handle.begin()  # as its first statement would
    return _checked(_OnSqlAlchemyBlocking(handle, _dialect(handle), session), handle)


def _dialect(connection: AsyncConnection | Connection) -> Dialect:
    match connection.dialect.name:
        case "sqlite":
            return "sqlite"
        case "postgresql":
            return "postgresql"
        case other:
            raise InvalidInput(f"messages live in SQLite or PostgreSQL; this connection speaks {other}")


def _checked(tx: Tx, connection: Connection | None) -> Tx:
    assert connection is not None  # it has begun
    raw = connection.connection
    if tx.dialect == "sqlite":
        tx.deferred = _sqlite_begun(raw.driver_connection, "SQLAlchemy connection", _OTHER_LEVEL)
    elif raw.dbapi_connection is not None and connection.dialect.detect_autocommit_setting(raw.dbapi_connection):
        raise _in_autocommit("SQLAlchemy connection", _OTHER_LEVEL)
    return tx


def _after_commit(session: Session, callback: Callable[[], None]) -> None:
    if _WAITING not in session.info:
        event.listen(session, "after_commit", _committed)
        event.listen(session, "after_transaction_end", _ended)
    session.info.setdefault(_WAITING, []).append(callback)


def _committed(session: Session) -> None:
    if not session.in_nested_transaction():  # a savepoint's release says nothing yet
        waiting, session.info[_WAITING] = session.info[_WAITING], []
        Tx.call_back(waiting)


def _ended(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info[_WAITING] = []  # rolled back, or called back already


# -- drivers ----------------------------------------------------------------------------------------------------------


class _OnDriver(_Enlisted):
    """Text goes to the driver. Nobody tells us of its commit, so callbacks are dropped; polling finds what is written.

    Cursors are our own: the connection's row factory is the caller's.
    """

    def on_commit(self, callback: Callable[[], None]) -> None:
        pass

    async def execute(self, statement: Executable, parameters: Parameters | None = None) -> CursorResult[Any]:
        raise TypeError("a driver's connection takes prepared text only")

    async def fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        return await self._run(self._fetch(statement, arguments))

    async def run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        await self._run(self._run_many(statement, arguments))

    async def _fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError

    async def _run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        raise NotImplementedError


class _OnAsyncpg(_OnDriver):
    async def _fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        driver: Any = self.connection
        rows: Sequence[Any] = await driver.fetch(statement, *arguments)
        return rows

    async def _run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        driver: Any = self.connection
        await driver.executemany(statement, arguments)


class _OnPsycopg(_OnDriver):
    """Its raw cursor takes the server's own placeholders, as asyncpg does."""

    async def _fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        async with self._cursor() as cursor:
            await cursor.execute(statement, arguments)
            rows: Sequence[Any] = await cursor.fetchall()
            return rows

    async def _run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        async with self._cursor() as cursor:
            await cursor.executemany(statement, arguments)

    def _cursor(self) -> Any:
        psycopg = _library("psycopg")
        return psycopg.AsyncRawCursor(self.connection, row_factory=psycopg.rows.tuple_row)


class _OnPsycopgBlocking(_OnDriver):
    blocks = True

    async def _fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        with self._cursor() as cursor:
            rows: Sequence[Any] = cursor.execute(statement, arguments).fetchall()
            return rows

    async def _run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        with self._cursor() as cursor:
            cursor.executemany(statement, arguments)

    def _cursor(self) -> Any:
        psycopg = _library("psycopg")
        return psycopg.RawCursor(self.connection, row_factory=psycopg.rows.tuple_row)


class _OnAiosqlite(_OnDriver):
    async def _fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        driver: Any = self.connection
        async with driver.cursor() as cursor:
            cursor.row_factory = None
            await cursor.execute(statement, arguments)
            rows: Sequence[Any] = await cursor.fetchall()
            return rows

    async def _run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        driver: Any = self.connection
        async with driver.cursor() as cursor:
            await cursor.executemany(statement, arguments)


class _OnSqlite3(_OnDriver):
    blocks = True

    async def _fetch(self, statement: str, arguments: Sequence[Any]) -> Sequence[Any]:
        driver: Any = self.connection
        cursor = driver.cursor()
        cursor.row_factory = None
        try:
            rows: Sequence[Any] = cursor.execute(statement, arguments).fetchall()
            return rows
        finally:
            cursor.close()

    async def _run_many(self, statement: str, arguments: Sequence[Sequence[Any]]) -> None:
        driver: Any = self.connection
        driver.executemany(statement, arguments).close()


async def _asyncpg(handle: Any) -> Tx:
    if not handle.is_in_transaction():
        raise _in_autocommit("asyncpg connection", "begin one by `async with connection.transaction():`")
    return _OnAsyncpg(handle, "postgresql")


async def _psycopg(handle: Any) -> Tx:
    _refuse_psycopg_autocommit(handle, "begin one by `async with connection.transaction():`")
    return _OnPsycopg(handle, "postgresql")


def _psycopg_blocking(handle: Any) -> Tx:
    _refuse_psycopg_autocommit(handle, "begin one by `with connection.transaction():`")
    return _OnPsycopgBlocking(handle, "postgresql")


def _refuse_psycopg_autocommit(handle: Any, todo: str) -> None:
    # Without autocommit the first statement begins a transaction.
    if handle.autocommit and handle.info.transaction_status.name not in ("INTRANS", "INERROR"):
        raise _in_autocommit("psycopg connection", todo)


async def _aiosqlite(handle: Any) -> Tx:
    tx = _OnAiosqlite(handle, "sqlite")
    tx.deferred = _sqlite_begun(handle, "aiosqlite connection", _SAY_BEGIN)
    return tx


def _sqlite3(handle: Any) -> Tx:
    tx = _OnSqlite3(handle, "sqlite")
    tx.deferred = _sqlite_begun(handle, "sqlite3 connection", _SAY_BEGIN)
    return tx


def _sqlite_begun(driver: Any, name: str, todo: str) -> bool:
    """Whether a transaction is open; False says that our first write begins one, raises where nothing would."""
    if driver.in_transaction:
        return True
    inner = getattr(driver, "_conn", driver)  # aiosqlite shows no `autocommit`
    if driver.isolation_level is None or getattr(inner, "autocommit", False) is True:  # `autocommit` is Python 3.12's
        raise _in_autocommit(name, todo)
    return False


# -- which is which ---------------------------------------------------------------------------------------------------

_OTHER_LEVEL = "use another isolation_level than AUTOCOMMIT"
_SAY_BEGIN = 'begin one by execute("BEGIN IMMEDIATE")'

# By name along the class's ancestors, so that no driver is imported that is not in use.
_ASYNC: dict[str, Callable[[Any], Awaitable[Tx]]] = {
    "sqlalchemy.AsyncSession": _async_session,
    "sqlalchemy.async_scoped_session": _async_scoped_session,
    "sqlalchemy.AsyncConnection": _async_connection,
    "asyncpg.Connection": _asyncpg,
    "asyncpg.PoolConnectionProxy": _asyncpg,
    "psycopg.AsyncConnection": _psycopg,
    "aiosqlite.Connection": _aiosqlite,
}
_BLOCKING: dict[str, Callable[[Any], Tx]] = {
    "sqlalchemy.Session": _session,
    "sqlalchemy.scoped_session": _scoped_session,
    "sqlalchemy.Connection": _connection,
    "psycopg.Connection": _psycopg_blocking,
    "sqlite3.Connection": _sqlite3,
}


def _find(handle: object, wanted: dict[str, T], others: dict[str, Any], but: str) -> T:
    names = [f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in type(handle).__mro__]
    for name in names:
        if name in wanted:
            return wanted[name]
        if name in others:
            raise InvalidInput(f"{name} does not fit here: {but}")
    raise InvalidInput(f"{names[0]} holds no transaction; these do: {', '.join(sorted(wanted))}")


def _library(name: str) -> Any:
    # A handle of it exists, so it is loaded; importing it here would make it a requirement of everybody.
    return sys.modules[name]


def _in_autocommit(name: str, todo: str) -> InvalidInput:
    return InvalidInput(
        f"this {name} has no transaction open (autocommit), so a message could not share the fate of your rows: {todo}"
    )


async def _refuse_other_process(tx: Tx) -> None:
    if tx.dialect == "sqlite":
        if tx.takes_text:
            files: Sequence[Any] = await tx.fetch(_FILES, ())
        else:
            files = (await tx.execute(text(_FILES))).all()
        refuse_other_process(files[0][2])


def _translated(error: Exception) -> Exception:
    origin = getattr(error, "orig", None) or error
    if getattr(origin, "sqlstate", None) == "42P01" or "no such table" in str(origin):
        return SchemaOutdated("this database (or search_path) lacks the tables of messaging; run `holdfast migrate`")
    return translate(error)
