"""One statement that commits itself: as sound as a transaction, with fewer round trips on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import bindparam, insert, text, update

from holdfast.db.border import ConstraintFailed, KeyTaken
from holdfast.db.connect import connect
from holdfast.db.database import Database
from holdfast.db.prepared import InsertAll, Prepared
from holdfast.errors import Conflict, OutcomeUnknown, Unavailable
from holdfast.settings import DatabaseSettings
from tests.conftest import eventually
from tests.db.jars import content, jars, make_jars, put, run_cancelled, seen
from tests.db.proxy import LossyProxy
from tests.db.test_postgres import ask, cancel_before_its_reply, kill, loop_turns, opened
from tests.servers.postgres import HOST, USER, PostgresServer

CANCEL_PLACES = 120
ADD = Prepared(
    lambda _: (
        update(jars)
        .where(jars.c.name == bindparam("jar"))
        .values(beans=jars.c.beans + bindparam("more"))
        .returning(jars.c.name, jars.c.beans)
    )
)
PUT = InsertAll(jars)


@pytest.fixture
async def narrow(database_url: str) -> AsyncIterator[Database]:
    """A database with a single connection to write with: one that is lost or left dirty shows at once."""
    opened = await connect(DatabaseSettings(url=database_url, pool_size=1, readers=1))
    await make_jars(opened)
    yield opened
    await opened.close()


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[Database]:
    async with opened(postgres_url, pool_size=1) as database:
        await make_jars(database)
        yield database


# -- on each backend --------------------------------------------------------------------------------------------------


async def test_what_the_statement_wrote_is_there_and_what_it_returned_is_told(database: Database) -> None:
    await make_jars(database, "a", "b")
    async with database.single() as tx:
        assert [tuple(row) for row in await ADD.rows(tx, jar="a", more=5)] == [("a", 5)]
    async with database.single() as tx:
        await tx.execute(update(jars).where(jars.c.name == "b").values(beans=7))
    async with database.single() as tx:
        await PUT.many(tx, [{"name": "c", "beans": 1}, {"name": "d", "beans": 2}])
    assert await content(database) == {"a": 5, "b": 7, "c": 1, "d": 2}


async def test_a_block_without_a_statement_does_no_harm(narrow: Database) -> None:
    for _ in range(3):
        async with narrow.single():
            pass
    assert await content(narrow) == {}


async def test_callbacks_run_in_order_after_the_statement_is_committed(database: Database) -> None:
    woken: list[str] = []
    async with database.single() as tx:
        tx.on_commit(lambda: woken.append("first"))
        await put(tx, "a")
        tx.on_commit(lambda: woken.append("second"))
        assert woken == []
    assert woken == ["first", "second"]


@pytest.mark.parametrize("swallowed", [False, True])
async def test_callbacks_of_a_statement_that_failed_never_run(narrow: Database, swallowed: bool) -> None:
    """Also not when the block goes on as if nothing were: the error is raised at its end."""
    await make_jars(narrow, "taken")
    woken: list[str] = []

    async def work() -> None:
        async with narrow.single() as tx:
            tx.on_commit(lambda: woken.append("x"))
            try:
                await put(tx, "taken", 9)
            except Conflict:
                if not swallowed:
                    raise

    with pytest.raises(KeyTaken) as caught:
        await work()
    assert caught.value.__cause__ is not None
    assert woken == []
    async with narrow.single() as tx:
        await put(tx, "after")
    assert await content(narrow) == {"taken": 0, "after": 0}
    assert woken == []


async def test_a_block_that_raises_before_its_statement_calls_nobody_back(narrow: Database) -> None:
    woken: list[str] = []

    async def work() -> None:
        async with narrow.single() as tx:
            tx.on_commit(lambda: woken.append("x"))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await work()
    async with narrow.single() as tx:
        await put(tx, "after")
    assert await content(narrow) == {"after": 0}
    assert woken == []


async def test_a_broken_rule_is_a_failed_constraint_and_no_unknown_outcome(database: Database) -> None:
    with pytest.raises(ConstraintFailed):
        async with database.single() as tx:
            await tx.execute(insert(jars).values(name="a", beans=-1))
    assert await content(database) == {}


async def test_cancelled_at_any_place_the_connection_stays_usable_and_nobody_is_called_back_for_nothing(
    narrow: Database,
) -> None:
    """Cancels at the first wait, at the second, and so on to the end; after each the one connection still works."""

    async def work(number: int) -> None:
        async with narrow.single() as tx:
            tx.on_commit(lambda: woken.append(number))
            await put(tx, f"{number}")

    for number in range(1, CANCEL_PLACES):
        woken: list[int] = []
        ended = await run_cancelled(work(number), at=number)
        async with asyncio.timeout(20):
            async with narrow.single() as tx:
                await put(tx, f"{number}-single")
            async with narrow.transaction() as tx:
                await put(tx, f"{number}-after")
        found = await content(narrow)
        assert {f"{number}-single", f"{number}-after"} <= set(found)
        assert not woken or f"{number}" in found, f"called back without a commit, cancelled at {number}"
        if ended:
            assert (woken, f"{number}" in found) == ([number], True)
            return
    pytest.fail(f"it has more than {CANCEL_PLACES} waits")


# -- on PostgreSQL ----------------------------------------------------------------------------------------------------


async def test_a_second_statement_is_refused_since_the_first_is_committed_already(postgres: Database) -> None:
    async def by_sqlalchemy() -> None:
        async with postgres.single() as tx:
            await put(tx, "first")
            await put(tx, "second")

    async def on_the_driver() -> None:
        async with postgres.single() as tx:
            await ADD.rows(tx, jar="first", more=1)
            await ADD.rows(tx, jar="first", more=1)

    with pytest.raises(RuntimeError, match=r"use transaction\(\)"):
        await by_sqlalchemy()
    assert await content(postgres) == {"first": 0}
    with pytest.raises(RuntimeError, match=r"use transaction\(\)"):
        await on_the_driver()
    assert await content(postgres) == {"first": 1}


async def test_many_rows_of_one_copy_are_there_or_none(postgres: Database) -> None:
    rows = [{"name": str(number), "beans": number} for number in range(120)]
    async with postgres.single() as tx:
        await PUT.many(tx, rows)
    assert len(await content(postgres)) == 120
    with pytest.raises(KeyTaken):
        async with postgres.single() as tx:
            await PUT.many(tx, [{"name": f"new {row['name']}", "beans": 1} for row in rows] + [rows[0]])
    assert len(await content(postgres)) == 120


async def test_a_connection_cut_while_the_statement_runs_is_an_unknown_outcome(
    postgres: Database, postgres_url: str
) -> None:
    """`Unavailable` would say that nothing happened, and nobody knows that."""
    woken: list[str] = []

    async def work() -> None:
        async with postgres.single() as tx:
            tx.on_commit(lambda: woken.append("x"))
            await tx.execute(text("SELECT pg_sleep(600)"))

    task = asyncio.create_task(work())
    found: list[int] = []

    async def sleeps() -> bool:
        pid = await ask(postgres_url, "SELECT max(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
        if isinstance(pid, int):
            found.append(pid)
        return bool(found)

    await eventually(sleeps, "the statement runs")
    await kill(postgres_url, found[0])
    with pytest.raises(OutcomeUnknown) as caught:
        await task
    assert caught.value.__cause__ is not None
    assert not isinstance(caught.value, Unavailable)
    assert woken == []
    async with asyncio.timeout(20), postgres.single() as tx:
        await put(tx, "after")
    assert await content(postgres) == {"after": 0}


async def test_a_lost_reply_is_an_unknown_outcome_although_the_row_is_there(
    postgres_server: PostgresServer, postgres_name: str, postgres_url: str
) -> None:
    async with LossyProxy(postgres_server.port) as proxy:
        through_proxy = f"postgresql://{USER}@{HOST}:{proxy.port}/{postgres_name}"
        async with opened(through_proxy, pool_size=1) as database:
            await make_jars(database, "held up")
            async with database.single() as tx:
                await ADD.rows(tx, jar="held up", more=1)  # prepared: from now on the parameters travel alone
            woken: list[str] = []

            async def work() -> None:
                async with database.single() as tx:
                    tx.on_commit(lambda: woken.append("x"))
                    await ADD.rows(tx, jar="held up", more=1)

            async def written() -> bool:
                return await ask(postgres_url, "SELECT beans FROM jar") == 2

            proxy.hold = b"held up"
            task = asyncio.create_task(work())
            await asyncio.wait_for(proxy.held.wait(), 20)
            proxy.hold = None
            await eventually(written, "the statement is committed")
            proxy.cut()
            with pytest.raises(OutcomeUnknown):
                await task
            assert woken == []
            proxy.release.set()
            async with asyncio.timeout(20):
                assert await content(database) == {"held up": 2}


@pytest.mark.parametrize("cancels", [1, 2])
async def test_cancelled_before_its_reply_came_the_connection_is_usable(
    postgres_server: PostgresServer, postgres_name: str, postgres_url: str, cancels: int
) -> None:
    async with LossyProxy(postgres_server.port) as proxy:
        through_proxy = f"postgresql://{USER}@{HOST}:{proxy.port}/{postgres_name}"
        async with opened(through_proxy, pool_size=1) as database:
            await make_jars(database)
            woken: list[str] = []

            async def work() -> None:
                async with database.single() as tx:
                    tx.on_commit(lambda: woken.append("x"))
                    await put(tx, "left")

            await cancel_before_its_reply(proxy, work(), b"INSERT", cancels)
            assert woken == []
            async with asyncio.timeout(20):
                async with database.single() as tx:
                    await put(tx, "after")
                async with database.transaction() as tx:
                    assert "after" in await seen(tx)
            assert await ask(postgres_url, "SELECT count(*) FROM jar WHERE name = 'after'") == 1


# -- dead connections in the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["transaction", "single", "read"])
async def test_after_every_idle_connection_was_killed_the_first_to_come_notices_nothing(
    postgres_url: str, way: str
) -> None:
    async with opened(postgres_url, pool_size=3) as database:
        await make_jars(database, "a")

        async def hold(together: asyncio.Barrier) -> None:
            async with database.transaction() as tx:
                await seen(tx)
                await together.wait()

        barrier = asyncio.Barrier(3)
        await asyncio.gather(*(hold(barrier) for _ in range(3)))
        ours = "FROM pg_stat_activity WHERE application_name = 'holdfast' AND datname = current_database()"
        assert await ask(postgres_url, f"SELECT count(pg_terminate_backend(pid, 10000)) {ours}") == 3

        async def gone() -> bool:
            return await ask(postgres_url, f"SELECT count(*) {ours}") == 0

        await eventually(gone, "they are gone")  # and this side has heard of it
        await loop_turns(50)

        async def use(number: int) -> None:
            if way == "read":
                async with database.read() as tx:
                    assert "a" in await seen(tx)
                return
            async with database.single() if way == "single" else database.transaction() as tx:
                await put(tx, str(number))

        await asyncio.gather(*(use(number) for number in range(6)))
        assert len(await content(database)) == (1 if way == "read" else 7)
