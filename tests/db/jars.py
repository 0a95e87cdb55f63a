"""The table that the tests of this folder write: jars that hold so many beans."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

from sqlalchemy import CheckConstraint, Column, Integer, MetaData, Table, Text, insert, select, update
from sqlalchemy.schema import CreateTable

from holdfast.db.database import Database, Tx

metadata = MetaData()
jars = Table(
    "jar",
    metadata,
    Column("name", Text, primary_key=True),
    Column("beans", Integer, CheckConstraint("beans >= 0", name="ck_jar_beans"), nullable=False),
)


async def make_jars(database: Database, *names: str) -> None:
    """Create the table, and empty jars of these names."""
    async with database.transaction() as tx:
        await tx.execute(CreateTable(jars, if_not_exists=True))
        for name in names:
            await put(tx, name)


async def put(tx: Tx, name: str, beans: int = 0) -> None:
    """A new jar."""
    await tx.execute(insert(jars).values(name=name, beans=beans))


async def add(tx: Tx, name: str, beans: int, at_most: int = 1_000_000) -> int | None:
    """Add beans unless they would be too many; answers how many there are now."""
    statement = (
        update(jars)
        .where(jars.c.name == name, jars.c.beans + beans <= at_most)
        .values(beans=jars.c.beans + beans)
        .returning(jars.c.beans)
    )
    now: int | None = (await tx.execute(statement)).scalar_one_or_none()
    return now


async def seen(tx: Tx) -> dict[str, int]:
    """Name -> beans, as the transaction sees them."""
    return {row.name: row.beans for row in await tx.execute(select(jars.c.name, jars.c.beans))}


async def content(database: Database) -> dict[str, int]:
    """Name -> beans, of what is committed."""
    async with database.read() as tx:
        return await seen(tx)


class CancelledAt:
    """Runs a coroutine and cancels its task at the n-th place where it waits: the same place on every run."""

    def __init__(self, work: Coroutine[Any, Any, None], at: int) -> None:
        self._work = work
        self._at = at
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, None]:
        inner = self._work.__await__()
        error: BaseException | None = None
        while True:
            try:
                wait = inner.throw(error) if error is not None else next(inner)
            except StopIteration:
                return
            self.waits += 1
            if self.waits == self._at and (task := asyncio.current_task()):
                task.cancel()
            error = None
            try:
                yield wait
            except BaseException as raised:
                error = raised


async def run_cancelled(work: Coroutine[Any, Any, None], at: int) -> bool:
    """Run the work, cancelled at its n-th wait; answers whether it has fewer waits, and so ended by itself."""
    guarded = CancelledAt(work, at)

    async def run() -> None:
        await guarded

    task = asyncio.create_task(run())
    await asyncio.wait([task], timeout=30)
    assert task.done(), f"hangs after a cancellation at wait {at}"
    if task.cancelled():
        return False
    task.result()
    return guarded.waits < at
