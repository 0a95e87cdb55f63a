"""Database and Tx: one API over SQLite and PostgreSQL.

`async with db.transaction() as tx` opens a transaction, `tx` is the explicit first argument of everything that shares
it, and leaving the block commits. `async with db.read() as tx` reads outside of any write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from sqlalchemy import CursorResult, Executable
from sqlalchemy.ext.asyncio import AsyncConnection

from holdfast import observe
from holdfast.db.border import translate, translate_commit

Dialect = Literal["sqlite", "postgresql"]
T = TypeVar("T")
Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]

log = observe.logger("db")


class Tx:
    """One open transaction; valid only inside the block that opened it."""

    takes_text: ClassVar[bool] = True  # `Prepared` may hand its text to the driver, not only its statement to `execute`
    copies = True
    deferred = False  # on SQLite: it is open and may not hold the write lock yet

    def __init__(self, connection: AsyncConnection, dialect: Dialect) -> None:
        self.connection = connection
        self.dialect = dialect
        self.copies = dialect == "postgresql" and type(self).copies  # whether `copy` may be used
        self.memo: dict[Any, Any] = {}  # what was read in this transaction and cannot change during it
        self.void: Exception | None = None  # what a statement failed with; the transaction can only be rolled back
        self._after_commit: list[Callable[[], None]] = []
        self._causes: dict[int, tuple[Any, Mapping[str, str]]] = {}
        self._driver: Any = None

    async def execute(self, statement: Executable, parameters: Parameters | None = None) -> CursorResult[Any]:
        """Run one statement; a list of parameter sets runs it for each.

        Raises `Conflict`, `Unavailable` or `ConstraintFailed`; in each case the transaction is void and must be left.
        """
        return await self._run(self.connection.execute(statement, parameters))

    async def fetch(self, text: str, arguments: Sequence[Any]) -> Sequence[Any]:
        """Run one statement on the driver and fetch all its rows; for `Prepared`. Raises as `execute` does."""
        driver = await self._on_driver()
        if self.dialect == "postgresql":
            rows: Sequence[Any] = await self._run(driver.fetch(text, *arguments))
        else:
            rows = await self._run(driver.execute_fetchall(text, arguments))
        return rows

    async def run_many(self, text: str, arguments: Sequence[Sequence[Any]]) -> None:
        """Run one statement for each set of arguments on the driver; for `Prepared`. Raises as `execute` does."""
        driver = await self._on_driver()
        if self.dialect == "postgresql":
            await self._run(driver.executemany(text, arguments))
        else:
            await (await self._run(driver.executemany(text, arguments))).close()

    async def copy(self, table: str, columns: Sequence[str], rows: Collection[Sequence[Any]]) -> None:
        """Insert rows by PostgreSQL's COPY, on the driver; for `InsertAll`. Raises as `execute` does."""
        driver = await self._on_driver()
        await self._run(driver.copy_records_to_table(table, columns=columns, records=rows))

    def refuse_void(self) -> None:
        """Raise what a statement of this transaction failed with, if one did."""
        if self.void is not None:
            raise self.void

    def caused(self, by: Any, trace: Mapping[str, str]) -> None:
        """Note the trace of a request or message that is decided in this transaction; `by` is known by identity."""
        if trace:
            self._causes[id(by)] = (by, trace)  # kept alive, so that its identity stays its own

    def trace_of(self, by: Any) -> Mapping[str, str]:
        """The trace that a request or message came with; several may share one transaction."""
        return self._causes[id(by)][1] if id(by) in self._causes else {}

    def on_commit(self, callback: Callable[[], None]) -> None:
        """Call back once the commit is certain, in order of registration; never after a rollback.

        The callback must neither wait nor fail: it wakes somebody up. What must not be lost belongs in a row.
        """
        self._after_commit.append(callback)

    async def _run(self, statement: Coroutine[Any, Any, T]) -> T:
        try:
            if self.dialect == "sqlite":
                # The statement runs in a thread that cannot be stopped; leaving it behind would lose the connection.
                return await outlast(awaited(statement))
            return await statement
        except Exception as error:
            self.void = translate(error)
            raise self.void from self.void.__cause__

    async def _on_driver(self) -> Any:
        if self._driver is None:
            self._driver = (await self.connection.get_raw_connection()).driver_connection
        return self._driver

    def committed(self) -> None:
        """Run the callbacks; called by the database after COMMIT."""
        self.call_back(self._after_commit)

    @staticmethod
    def call_back(callbacks: Sequence[Callable[[], None]]) -> None:
        """Run callbacks of a commit, each whatever became of those before it."""
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("after_commit_failed")  # the commit stands, whatever a wake-up does


class SingleTx(Tx):
    """A transaction that its one statement commits."""

    _spent = False

    async def _run(self, statement: Coroutine[Any, Any, T]) -> T:
        if self._spent:
            statement.close()
            raise RuntimeError("a second statement in single(); use transaction()")
        self._spent = True
        try:
            return await statement
        except Exception as error:
            self.void = translate_commit(error)
            raise self.void from self.void.__cause__


class Database(Protocol):
    """What both databases promise."""

    dialect: Dialect

    def transaction(self) -> AbstractAsyncContextManager[Tx]:
        """Open a transaction that commits when the block ends and rolls back when it raises.

        Raises `Unavailable` when nothing was committed, `OutcomeUnknown` when the reply to COMMIT was lost, `Conflict`
        when another writer won. After any of them the caller decides: nothing is retried here.
        """
        ...

    def single(self) -> AbstractAsyncContextManager[Tx]:
        """Open a transaction for one statement, which may write: it is committed with its own reply.

        On PostgreSQL that saves the round trips of BEGIN and COMMIT. The statement itself raises `OutcomeUnknown` when
        its reply was lost; a second one in the block raises `RuntimeError`.
        """
        ...

    def read(self, *, snapshot: bool = False) -> AbstractAsyncContextManager[Tx]:
        """Open a read-only view; with `snapshot` all statements in the block see one instant."""
        ...

    async def close(self) -> None:
        """Give back every connection and lock."""
        ...


@asynccontextmanager
async def committing(
    tx: Tx, commit: Callable[[], Awaitable[None]], rollback: Callable[[], Awaitable[None]]
) -> AsyncIterator[Tx]:
    """Run a block in an opened transaction: commit when it ends, roll back when it raises or is cancelled.

    A statement that failed voids the transaction for good: a block that swallowed its error is rolled back, and the
    error is raised here, since the database would answer COMMIT with a silent ROLLBACK.
    """
    try:
        yield tx
        tx.refuse_void()
    except BaseException:
        await outlast(quietly(rollback))
        raise

    async def finish() -> None:
        await commit()
        tx.committed()

    try:
        await outlast(finish())
    except Exception as error:
        await outlast(quietly(rollback))
        raise translate_commit(error) from error


async def outlast(work: Coroutine[Any, Any, T]) -> T:
    """Finish the work although the caller is cancelled meanwhile, however often; then let the cancellation through.

    A COMMIT that is under way cannot be called back, and a connection must not go back to its pool half-way.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.warning("failed_while_cancelled", error=repr(failure)[:300])
        raise cancelled
    return task.result()


async def quietly(rollback: Callable[[], Awaitable[None]]) -> None:
    """Roll back what has failed already; that this fails too is for the log."""
    try:
        await rollback()
    except Exception as error:
        log.warning("rollback_failed", error=str(translate(error))[:300])  # the connection is discarded by its pool


async def awaited(work: Awaitable[T]) -> T:
    return await work
