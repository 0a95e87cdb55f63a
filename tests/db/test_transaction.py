"""Transactions on each backend: all or nothing, whatever ends them."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import insert, text

from holdfast.db.border import ConstraintFailed
from holdfast.db.connect import connect
from holdfast.db.database import Database
from holdfast.errors import Conflict, HoldfastError, InvalidSettings
from holdfast.settings import DatabaseSettings
from tests.db.jars import add, content, jars, make_jars, put, run_cancelled, seen

CANCEL_PLACES = 120


@pytest.fixture
async def narrow(database_url: str) -> AsyncIterator[Database]:
    """A database with a single connection to write with: one that is lost or left dirty shows at once."""
    opened = await connect(DatabaseSettings(url=database_url, pool_size=1, readers=1))
    await make_jars(opened)
    yield opened
    await opened.close()


async def test_what_a_block_wrote_is_there_when_it_ends(database: Database) -> None:
    async with database.transaction() as tx:
        await put(tx, "a", 1)
        await put(tx, "b", 2)
        assert await seen(tx) == {"a": 1, "b": 2}
    assert await content(database) == {"a": 1, "b": 2}


async def test_nothing_of_a_block_that_raised_is_there(database: Database) -> None:
    async def work() -> None:
        async with database.transaction() as tx:
            await put(tx, "a", 1)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await work()
    assert await content(database) == {}


async def test_what_is_not_committed_is_not_seen_by_others(database: Database) -> None:
    async with database.transaction() as tx:
        await put(tx, "a", 1)
        assert await content(database) == {}


async def test_an_empty_transaction_commits(database: Database) -> None:
    async with database.transaction():
        pass
    assert await content(database) == {}


async def test_a_taken_key_is_a_conflict_with_the_cause_kept_and_no_parameters_shown(database: Database) -> None:
    await make_jars(database, "the-buyers-name")
    with pytest.raises(Conflict) as caught:
        async with database.transaction() as tx:
            await put(tx, "the-buyers-name", 77)
    assert caught.value.__cause__ is not None
    assert "77" not in caught.value.detail
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize("beans", [-1, None])
async def test_a_broken_rule_of_the_table_is_a_failed_constraint(database: Database, beans: int | None) -> None:
    with pytest.raises(ConstraintFailed):
        async with database.transaction() as tx:
            await tx.execute(text("INSERT INTO jar (name, beans) VALUES ('a', :beans)"), {"beans": beans})
    assert await content(database) == {}


async def test_a_wrong_statement_is_no_matter_of_trying_again(database: Database) -> None:
    with pytest.raises(Exception, match="no_such_table") as caught:
        async with database.transaction() as tx:
            await tx.execute(text("SELECT * FROM no_such_table"))
    assert not (isinstance(caught.value, HoldfastError) and caught.value.retryable)


UNFIT = [2**80, "half a pair \ud800", "a nul \x00 byte", b"\xff", object()]


@pytest.mark.parametrize("value", UNFIT, ids=["huge", "surrogate", "nul", "bytes", "object"])
@pytest.mark.parametrize("column", ["name", "beans"])
async def test_a_value_a_column_cannot_hold_does_not_look_like_a_database_that_is_away(
    database: Database, column: str, value: object
) -> None:
    """Otherwise a buyer could make every other request of the batch wait and fail."""
    try:
        async with database.transaction() as tx:
            await tx.execute(insert(jars).values({"name": "a", "beans": 1} | {column: value}))
    except Exception as error:
        assert not (isinstance(error, HoldfastError) and error.retryable), error  # noqa: PT017  # SQLite takes some
    async with database.transaction() as tx:
        await put(tx, "after")


async def test_a_drivers_error_shows_no_parameters_in_logs_and_tracebacks(database: Database) -> None:
    """They may hold a buyer's data or a secret."""
    errors = []
    for statement, name in [("INSERT INTO nowhere VALUES (:name)", "ann"), ("INSERT INTO jar VALUES (:name, -1)", "a")]:
        try:
            async with database.transaction() as tx:
                await tx.execute(text(statement), {"name": "-".join(["correct", "horse", name])})
        except Exception as error:
            errors.append("".join(traceback.format_exception(error)))
    assert len(errors) == 2
    assert [told for told in errors if "correct-horse" in told] == []


async def test_a_swallowed_error_does_not_turn_into_a_commit_that_never_happened(database: Database) -> None:
    """PostgreSQL answers COMMIT of a failed transaction with ROLLBACK and no error: that must not pass as success."""
    await make_jars(database, "taken")
    woken: list[str] = []
    told = None
    try:
        async with database.transaction() as tx:
            tx.on_commit(lambda: woken.append("committed"))
            await put(tx, "mine", 1)
            try:
                await put(tx, "taken")
            except Conflict as error:
                told = error
    except HoldfastError:
        assert woken == []
        assert await content(database) == {"taken": 0}
    else:
        assert await content(database) == {"taken": 0, "mine": 1}, "said to be committed, and is not"
    assert told is not None


async def test_callbacks_run_in_order_and_only_after_the_commit(database: Database) -> None:
    seen_by_callback: list[str] = []
    async with database.transaction() as tx:
        tx.on_commit(lambda: seen_by_callback.append("first"))
        tx.on_commit(lambda: seen_by_callback.append("second"))
        await put(tx, "a")
        assert seen_by_callback == []
    assert seen_by_callback == ["first", "second"]


async def test_callbacks_of_a_rolled_back_transaction_never_run(database: Database) -> None:
    woken: list[str] = []

    async def work() -> None:
        async with database.transaction() as tx:
            tx.on_commit(lambda: woken.append("x"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await work()
    async with database.transaction():
        pass
    assert woken == []


async def test_a_failing_callback_spoils_neither_the_commit_nor_the_next_callback(database: Database) -> None:
    woken: list[str] = []

    def fail() -> None:
        raise RuntimeError("boom")

    async with database.transaction() as tx:
        tx.on_commit(fail)
        tx.on_commit(lambda: woken.append("next"))
        await put(tx, "a")
    assert woken == ["next"]
    assert await content(database) == {"a": 0}


async def test_many_writers_at_once_lose_no_update(database: Database) -> None:
    await make_jars(database, "jar")

    async def write() -> None:
        async with database.transaction() as tx:
            await add(tx, "jar", 1)

    await asyncio.gather(*(write() for _ in range(40)))
    assert await content(database) == {"jar": 40}


async def test_a_transaction_that_is_cancelled_while_it_idles_leaves_nothing(narrow: Database) -> None:
    written = asyncio.Event()

    async def work() -> None:
        async with narrow.transaction() as tx:
            await put(tx, "a")
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async with narrow.transaction() as tx:
        assert await seen(tx) == {}
        await put(tx, "b")
    assert await content(narrow) == {"b": 0}


async def test_a_caller_cancelled_while_it_queues_for_the_connection_takes_nothing_with_it(narrow: Database) -> None:
    async def work() -> None:
        async with narrow.transaction() as tx:
            await put(tx, "never")

    async with narrow.transaction() as tx:
        tasks = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await put(tx, "a")
    assert all(task.cancelled() for task in tasks)

    async with asyncio.timeout(20), narrow.transaction() as tx:
        await put(tx, "b")
    assert await content(narrow) == {"a": 0, "b": 0}


async def test_cancelled_at_any_place_a_transaction_is_whole_or_nothing(narrow: Database) -> None:
    """Cancels at the first wait, at the second, and so on to the end; after each the one connection still works."""

    async def work(number: int) -> None:
        async with narrow.transaction() as tx:
            await put(tx, f"{number}-left")
            await put(tx, f"{number}-right")

    for number in range(1, CANCEL_PLACES):
        ended = await run_cancelled(work(number), at=number)
        async with asyncio.timeout(20), narrow.transaction() as tx:
            await put(tx, f"{number}-after")
        found = await content(narrow)
        assert (f"{number}-left" in found) == (f"{number}-right" in found), f"half a transaction, cancelled at {number}"
        assert f"{number}-after" in found
        if ended:
            assert f"{number}-left" in found
            return
    pytest.fail(f"a transaction has more than {CANCEL_PLACES} waits")


async def test_cancelled_at_any_place_callbacks_run_if_and_only_if_it_was_committed(narrow: Database) -> None:
    async def work(number: int) -> None:
        async with narrow.transaction() as tx:
            tx.on_commit(lambda: woken.append(number))
            await put(tx, f"{number}")

    for number in range(1, CANCEL_PLACES):
        woken: list[int] = []
        ended = await run_cancelled(work(number), at=number)
        committed = f"{number}" in await content(narrow)
        assert (woken == [number]) == committed, f"cancelled at wait {number}: committed={committed}, woken={woken}"
        if ended:
            return
    pytest.fail(f"a transaction has more than {CANCEL_PLACES} waits")


async def test_cancelled_at_any_place_a_read_leaves_the_connection_usable(narrow: Database) -> None:
    async def work() -> None:
        async with narrow.read(snapshot=True) as tx:
            await seen(tx)

    for number in range(1, CANCEL_PLACES):
        ended = await run_cancelled(work(), at=number)
        async with asyncio.timeout(20):
            assert await content(narrow) == {}
            async with narrow.transaction() as tx:
                assert await seen(tx) == {}
        if ended:
            return
    pytest.fail(f"a read has more than {CANCEL_PLACES} waits")


async def test_a_transaction_cancelled_twice_leaves_the_connection_usable(narrow: Database) -> None:
    async def work(written: asyncio.Event) -> None:
        async with narrow.transaction() as tx:
            await put(tx, "a")
            written.set()
            await asyncio.Event().wait()

    for pause in range(12):
        written = asyncio.Event()
        task = asyncio.create_task(work(written))
        await written.wait()
        task.cancel()
        for _ in range(pause):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

        async with asyncio.timeout(20), narrow.transaction() as tx:
            assert await seen(tx) == {}


async def test_a_snapshot_sees_one_instant_while_a_writer_commits(database: Database) -> None:
    await make_jars(database, "a")
    async with database.read(snapshot=True) as view:
        assert await seen(view) == {"a": 0}
        async with database.transaction() as tx:
            await put(tx, "b")
            await add(tx, "a", 5)
        assert await seen(view) == {"a": 0}
    assert await content(database) == {"a": 5, "b": 0}


@pytest.mark.parametrize("snapshot", [True, False])
async def test_a_read_that_follows_a_commit_sees_it(database: Database, snapshot: bool) -> None:
    for number in range(5):
        async with database.transaction() as tx:
            await put(tx, str(number))
        async with database.read(snapshot=snapshot) as view:
            assert len(await seen(view)) == number + 1


async def test_a_snapshot_cannot_write_and_the_next_transaction_can(narrow: Database) -> None:
    with pytest.raises(HoldfastError):
        async with narrow.read(snapshot=True) as view:
            await put(view, "a")
    async with narrow.transaction() as tx:
        await put(tx, "b")
    assert await content(narrow) == {"b": 0}


async def test_a_read_that_raises_gives_its_connection_back(narrow: Database) -> None:
    async def work(snapshot: bool) -> None:
        async with narrow.read(snapshot=snapshot) as view:
            await seen(view)
            raise RuntimeError

    for snapshot in (True, False, True):
        with pytest.raises(RuntimeError):
            await work(snapshot)
    async with asyncio.timeout(20), narrow.read() as view:
        assert await seen(view) == {}


@pytest.mark.parametrize("url", ["mysql://x/y", "not a url", ""])
async def test_another_database_is_refused_by_the_name_of_the_setting(url: str) -> None:
    with pytest.raises(InvalidSettings, match="HOLDFAST_DATABASE"):
        await connect(DatabaseSettings(url=url))
