"""Enlisted handles among others: wake-ups by the commit, overlapping transactions, threads, two writers on SQLite."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker
from sqlalchemy.orm import scoped_session, sessionmaker

from holdfast import observe
from holdfast.bootstrap import System
from holdfast.errors import Conflict, InvalidInput, SchemaOutdated, Unavailable, Unroutable
from holdfast.messaging.enlist import ConnectionOutbox
from holdfast.messaging.outbox import Draft
from tests.conftest import StartSystem
from tests.contract.enlist.handles import HANDLES, Blocking, Handle, Heard, OnSqlite3, OpenHandle
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    TYPES,
    Ledger,
    Note,
    counts,
    hear_each_other,
    office,
    send,
    turn,
)

# -- wake-ups ---------------------------------------------------------------------------------------------------------

NEVER_POLLS = pytest.mark.parametrize("poll_ms", [600_000])


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", names, indirect=True)


@NEVER_POLLS
@kinds(*(name for name in HANDLES if "Session" in name))
async def test_the_commit_of_a_session_wakes_the_listeners_of_the_toolkit(
    system: System, open_handle: OpenHandle
) -> None:
    handle = await open_handle(outbox=ConnectionOutbox(TYPES, clock=system.clock, wakes=system.messaging))
    heard = Heard(system)
    await turn(system)
    for body in ("rolled back", "first", "second"):
        await handle.add(body)
        await handle.save()
        await (handle.rollback() if body == "rolled back" else handle.commit())
    await heard.become("first", "second")


@NEVER_POLLS
@kinds("postgresql-AsyncSession", "postgresql-Session")
async def test_the_commit_of_a_session_wakes_listeners_elsewhere(
    system: System, open_handle: OpenHandle, start_system: StartSystem
) -> None:
    other = await office(start_system, system.settings)
    await hear_each_other(system, 2)
    handle = await open_handle(outbox=ConnectionOutbox(TYPES, clock=system.clock, wakes=system.messaging))
    heard = Heard(other)
    await turn(other)
    await handle.add("far away")
    await handle.commit()
    await heard.become("far away")


@kinds(*(name for name in HANDLES if "Session" in name))
async def test_only_what_a_session_commits_counts_as_published(system: System, open_handle: OpenHandle) -> None:
    def published() -> float:
        return observe.registry.get_sample_value("holdfast_messages_published_total", {"exchange": EXCHANGE}) or 0.0

    handle, before = await open_handle(), published()
    await handle.add("rolled back")
    await handle.rollback()
    await handle.add("left open")
    await handle.there(handle.raw.close) if isinstance(handle, Blocking) else await handle.raw.close()
    await handle.write()
    await handle.commit()
    assert published() == before
    await handle.add_all([Draft(exchange=EXCHANGE, routing_key=KEY, body=Note(body)) for body in ("one", "two")])
    await handle.save()
    await handle.undo()
    await handle.save()
    await handle.release()
    assert published() == before
    await handle.commit()
    assert published() == before + 2


@NEVER_POLLS
@kinds("asyncpg", "psycopg", "psycopg-async", "postgresql-AsyncConnection", "postgresql-Connection")
async def test_a_notify_goes_out_with_the_commit(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle(outbox=ConnectionOutbox(TYPES, clock=system.clock, notify=True))
    heard = Heard(system)
    await hear_each_other(system, 1)
    await turn(system)
    await handle.begin()
    await handle.add("rolled back")
    await handle.rollback()
    await handle.begin()
    await handle.add("kept")
    await handle.commit()
    await heard.become("kept")


# -- several transactions at once -------------------------------------------------------------------------------------


@kinds(*(name for name, (backend, _) in HANDLES.items() if backend == "postgresql"))
async def test_ids_taken_early_and_committed_late_are_not_skipped(system: System, open_handle: OpenHandle) -> None:
    heard, early, late = Heard(system), await open_handle(), await open_handle()
    await early.begin()
    await early.add("early, committed last")
    for number in range(3):
        await late.begin()
        await late.add(f"late {number}")
        await late.commit()
    await heard.become("late 0", "late 1", "late 2")
    await early.commit()
    await heard.become("late 0", "late 1", "late 2", "early, committed last")


@kinds("asyncpg", "psycopg", "psycopg-async", "postgresql-AsyncSession", "postgresql-Session")
async def test_a_claim_committed_after_a_snapshot_was_taken_is_a_conflict(
    system: System, open_handle: OpenHandle
) -> None:
    one, two = await open_handle(), await open_handle()
    await two.begin()
    await two.run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    await two.run("SELECT count(*) FROM test_ledger")
    await one.begin()
    assert await one.first("clerk", "m-1")
    await one.commit()
    with pytest.raises(Conflict) as raised:
        await two.first("clerk", "m-1")
    assert raised.value.__cause__ is not None
    await two.rollback()
    await two.begin()
    assert not await two.first("clerk", "m-1")
    await two.rollback()


@kinds("psycopg")
async def test_one_outbox_serves_many_threads(system: System, open_handle: OpenHandle) -> None:
    handles = [await open_handle() for _ in range(4)]

    async def write(handle: Handle) -> None:
        for number in range(25):
            await handle.add(str(number))
            await handle.commit()

    await asyncio.gather(*(write(handle) for handle in handles))
    assert await counts(system) == (100, 0, 0)


@kinds("sqlite3", "sqlite3-BEGIN", "aiosqlite", "sqlite-AsyncSession", "sqlite-Session")
async def test_on_sqlite_the_user_and_the_toolkit_wait_for_each_other(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    async with system.database.transaction() as tx:
        await Ledger.write(tx, [Note("ours")])
        adding = asyncio.create_task(handle.add("user's"))
        await turn_of_the_loop()
        assert not adding.done()
    await adding
    sending = asyncio.create_task(send(system, "ours"))
    await turn_of_the_loop()
    assert not sending.done()
    assert await counts(system) == (0, 0, 0)
    await handle.commit()
    await sending
    assert await counts(system) == (2, 0, 0)


@kinds("sqlite3-BEGIN")
async def test_on_sqlite_our_own_reading_spoils_no_later_write(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    with pytest.raises(Unroutable):
        await handle.add("refused", key="nobody.listens")  # it has read the topology
    sending = asyncio.create_task(send(system, "ours"))
    await turn_of_the_loop()
    await handle.add("user's")
    await handle.commit()
    await sending
    assert await counts(system) == (2, 0, 0)


@kinds("sqlite3-BEGIN")
async def test_on_sqlite_a_transaction_that_read_before_another_wrote_is_told_so(
    system: System, open_handle: OpenHandle
) -> None:
    handle = await open_handle()
    await handle.begin()
    await handle.run("SELECT count(*) FROM test_ledger")
    await send(system, "ours")
    with pytest.raises(Unavailable, match="locked"):
        await handle.add("user's")
    await handle.rollback()
    await handle.begin()
    await handle.add("user's")
    await handle.commit()
    assert await counts(system) == (2, 0, 0)


async def turn_of_the_loop() -> None:
    """Let what was started reach its database, as far as it gets."""
    for _ in range(50):
        await asyncio.sleep(0)


OTHER_PROCESS = """
import sqlite3, sys
from holdfast.messaging.enlist import ConnectionInbox
from holdfast.errors import DatabaseInUse
connection = sqlite3.connect(sys.argv[1])
try:
    ConnectionInbox().first_sync(connection, "clerk", "m-1")
except DatabaseInUse as error:
    print(error.detail)
"""


@kinds("sqlite3")
async def test_on_sqlite_another_process_is_refused(system: System, open_handle: OpenHandle) -> None:
    path = (await open_handle()).path
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", OTHER_PROCESS, path, stdout=PIPE)
    told, _ = await process.communicate()
    assert f"process {os.getpid()} writes" in told.decode()
    async with system.database.read() as tx:
        assert (await tx.execute(text("SELECT count(*) FROM hf_inbox"))).scalar_one() == 0


# -- other shapes of the same handles ---------------------------------------------------------------------------------


@kinds("asyncpg")
async def test_a_connection_of_a_pool(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    async with asyncpg.create_pool(handle.dsn, min_size=1, max_size=1) as pool, pool.acquire() as pooled:
        async with pooled.transaction():
            await handle.outbox.add(pooled, EXCHANGE, KEY, Note("pooled"))
        with pytest.raises(InvalidInput, match="no transaction open"):
            await handle.outbox.add(pooled, EXCHANGE, KEY, Note("alone"))
    assert await counts(system) == (1, 0, 0)


@kinds("sqlite-AsyncSession", "postgresql-AsyncSession")
async def test_scoped_sessions_and_the_blocking_side_of_an_async_one(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.raw.run_sync(lambda session: handle.outbox.add_sync(session, EXCHANGE, KEY, Note("blocking side")))
    await handle.commit()
    scoped = async_scoped_session(async_sessionmaker(handle.raw.bind), asyncio.current_task)
    await handle.outbox.add(scoped, EXCHANGE, KEY, Note("scoped"))
    await scoped.commit()
    await scoped.remove()
    assert await counts(system) == (2, 0, 0)


@kinds("sqlite-Session", "postgresql-Session")
async def test_a_scoped_session(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    assert isinstance(handle, Blocking)
    scoped = scoped_session(sessionmaker(handle.raw.bind))
    await handle.there(lambda: handle.outbox.add_sync(scoped, EXCHANGE, KEY, Note("scoped")))
    await handle.there(scoped.commit)
    await handle.there(scoped.remove)
    assert await counts(system) == (1, 0, 0)


@kinds("psycopg", "psycopg-async")
async def test_a_transaction_begun_on_an_autocommitting_handle(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle(autocommit=True)
    await handle.run("BEGIN")
    await handle.add("never")
    await handle.run("ROLLBACK")
    await handle.run("BEGIN")
    await handle.add("ever")
    await handle.run("COMMIT")
    assert await counts(system) == (1, 0, 0)


@kinds("sqlite3", "psycopg")
async def test_a_database_without_our_tables_is_told_so(tmp_path: Path, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    if isinstance(handle, OnSqlite3):
        handle.url = make_url(f"sqlite:///{tmp_path}/empty.db")
        await handle.open()
    else:
        await handle.run("SET search_path TO elsewhere")
    with pytest.raises(SchemaOutdated):
        await handle.add("nowhere")
