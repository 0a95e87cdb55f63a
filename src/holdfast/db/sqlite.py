"""SQLite: one writer connection with BEGIN IMMEDIATE, readers apart, WAL, synchronous=FULL, one writing process.

The writer also owns the checkpoints: SQLite before 3.51.3 can corrupt a WAL database when two connections write and
checkpoint at once (sqlite.org/wal.html#walresetbug). A second writing process is refused by a lock file.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from sqlalchemy import URL, StaticPool, event, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from holdfast.db.border import translate
from holdfast.db.database import Dialect, Tx, awaited, committing, outlast
from holdfast.errors import DatabaseInUse, InvalidSettings, SchemaOutdated, Unavailable

MEMORY = ":memory:"

# The writer's pages in memory, at most 64 MiB: delayed messages fall anywhere into their index (measured while 200,000
# of them waited: 30,000 published per second, with SQLite's own 2 MiB 25,700).
CACHE = "cache_size = -65536"


class SqliteDatabase:
    """A SQLite file, or one in memory for tests (then readers share the writer's connection and wait for it)."""

    dialect: Dialect = "sqlite"

    def __init__(self, path: str, *, readers: int, read_only: bool, lock: IO[str] | None) -> None:
        self._path = path
        self._lock_file = lock
        self._read_only = read_only
        self._turn = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None
        self._writer = None if read_only else _writer_engine(path)
        self._readers = None if path == MEMORY else _reader_engine(path, readers)

    @classmethod
    async def open(cls, path: str, *, readers: int = 4, read_only: bool = False, create: bool = True) -> SqliteDatabase:
        """Open the file; it is created if missing, unless read-only or told not to.

        Raises `DatabaseInUse` when another process writes it, `InvalidSettings` when the folder or file is missing.
        """
        if path != MEMORY:
            _check_path(path, read_only=read_only, create=create)
            path = os.path.realpath(path)  # noqa: ASYNC240  # at start-up; one file has one lock, whatever its name
        lock = None if read_only or path == MEMORY else _take_lock(path)
        database = cls(path, readers=readers, read_only=read_only, lock=lock)
        try:
            # Creates the file and the WAL before the first reader comes, and finds out whether it is a database.
            async with database.read() if read_only else database.transaction() as tx:
                await tx.execute(text("SELECT count(*) FROM sqlite_master"))
        except BaseException as error:
            await database.close()
            if isinstance(error, DatabaseError):
                raise InvalidSettings(f"database: {path} is no SQLite database: {error.orig}") from error
            raise
        return database

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        if self._writer is None:
            raise Unavailable("this database was opened read-only")
        async with self._write_turn(), _connected(self._writer) as (connection, driver):
            await _begin(driver, "BEGIN IMMEDIATE")
            async with committing(Tx(connection, "sqlite"), driver.commit, driver.rollback) as tx:
                yield tx

    def single(self) -> AbstractAsyncContextManager[Tx]:
        return self.transaction()

    @asynccontextmanager
    async def read(self, *, snapshot: bool = False) -> AsyncIterator[Tx]:
        if self._readers is None:
            async with self.transaction() as tx:
                yield tx
            return
        async with _connected(self._readers) as (connection, driver):
            if snapshot:
                await _begin(driver, "BEGIN")  # deferred: the first SELECT fixes the snapshot
            yield Tx(connection, "sqlite")

    @property
    def writing(self) -> bool:
        """Whether a transaction is open."""
        return self._turn.locked()

    async def written(self) -> None:
        """Wait until the transactions that are open or waiting now have ended; not to be called within one."""
        async with self._write_turn():
            pass

    async def close(self) -> None:
        if self._readers is not None:
            await self._readers.dispose()
        if self._writer is not None:
            await self._writer.dispose()
        if self._lock_file is not None:
            self._lock_file.close()  # closing gives the lock back

    @asynccontextmanager
    async def _write_turn(self) -> AsyncIterator[None]:
        task = asyncio.current_task()
        if task is not None and self._holder is task:
            raise RuntimeError("this task already has a transaction open; pass its tx on instead of opening another")
        async with self._turn:
            self._holder = task
            try:
                yield
            finally:
                self._holder = None


@asynccontextmanager
async def _connected(engine: AsyncEngine) -> AsyncIterator[tuple[AsyncConnection, Any]]:
    """A connection of SQLAlchemy's, and the driver's under it."""
    try:
        connection = await engine.connect()
    except Exception as error:
        raise translate(error) from error
    driver: Any = (await connection.get_raw_connection()).driver_connection
    try:
        yield connection, driver
    finally:
        await outlast(_give_back(connection, driver))


async def _give_back(connection: AsyncConnection, driver: Any) -> None:
    try:
        if driver.in_transaction:  # a snapshot, or a COMMIT that failed
            await driver.rollback()
    finally:
        await connection.close()


async def _begin(driver: Any, statement: str) -> None:
    try:
        # To the end, whoever cancels: a connection left half-way is thrown away, and a database in memory with it.
        await outlast(awaited(driver.execute_fetchall(statement)))
    except Exception as error:
        raise translate(error) from error


def _check_path(name: str, *, read_only: bool, create: bool) -> None:
    try:
        path = Path(name).resolve()
        missing, folder, misplaced = not path.exists(), path.is_dir(), not path.parent.is_dir()
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"HOLDFAST_DATABASE: no file can have this name: {error}") from error
    if missing and read_only:
        raise InvalidSettings(f"database: there is no SQLite file {path}; run `holdfast migrate` first")
    if misplaced:
        raise InvalidSettings(f"database: the folder {path.parent} does not exist; create it first")
    if folder:
        raise InvalidSettings(f"database: {path} is a folder; name a file in it")
    if missing and not create:
        raise SchemaOutdated(f"there is no SQLite file {path} yet; run `holdfast migrate` first")


def _take_lock(path: str) -> IO[str]:
    try:
        lock = open(f"{path}.lock", "a+", encoding="utf-8")  # noqa: SIM115  # held until close()
    except OSError as error:
        raise InvalidSettings(f"database: cannot create {path}.lock: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read(32).strip()
        lock.close()
        raise _in_use(path, holder) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def refuse_other_process(path: str) -> None:
    """Raise `DatabaseInUse` when a process of ours other than this one writes the file."""
    try:
        lock = open(f"{path}.lock", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError:
        return  # in memory, or never opened by us
    with lock:
        holder = lock.read(32).strip()
        if holder == str(os.getpid()):
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise _in_use(path, holder) from error


def _in_use(path: str, holder: str) -> DatabaseInUse:
    return DatabaseInUse(
        f"process {holder or 'unknown'} writes {path} already; SQLite means one process (API and workers together): "
        "stop that one, or move to PostgreSQL for more"
    )


# For SQLAlchemy every connection is in autocommit, once and for all: BEGIN and COMMIT are asked of the driver, so that
# statements may go to it directly (`Prepared`), and what SQLAlchemy runs falls into the transaction that is open. Each
# word to the driver goes to its thread and back (30 to 50 us); SQLAlchemy's own BEGIN and reset took five of them.
_PLAIN: dict[str, Any] = {
    "isolation_level": "AUTOCOMMIT",
    "skip_autocommit_rollback": True,
    "pool_reset_on_return": None,
    "hide_parameters": True,
}
_WRITER = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 5000", CACHE)
_READER = ("query_only = ON", "busy_timeout = 5000")


def _writer_engine(path: str) -> AsyncEngine:
    url = URL.create("sqlite+aiosqlite", database=path)
    return _prepared(create_async_engine(url, poolclass=StaticPool, **_PLAIN), _WRITER)


def _reader_engine(path: str, readers: int) -> AsyncEngine:
    # The path stands in a URI of SQLite's, so `?`, `#` and `%` in it are quoted.
    url = URL.create("sqlite+aiosqlite", database=f"file:{quote(path)}", query={"mode": "ro", "uri": "true"})
    engine = create_async_engine(url, pool_size=readers, max_overflow=0, pool_timeout=15, **_PLAIN)
    return _prepared(engine, _READER)


def _prepared(engine: AsyncEngine, pragmas: Sequence[str]) -> AsyncEngine:
    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver opens no transaction of its own
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine
