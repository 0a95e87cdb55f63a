"""PostgreSQL: what is refused at the start, and what is told when the server or its reply is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from holdfast.db.connect import connect
from holdfast.db.database import Database, Tx
from holdfast.errors import HoldfastError, OutcomeUnknown, Unavailable, UnsafeDatabase
from holdfast.settings import DatabaseSettings
from tests.conftest import eventually
from tests.db.jars import content, make_jars, put, seen
from tests.db.proxy import LossyProxy, RefusingServer, fatal
from tests.servers.postgres import HOST, USER, PostgresServer, require_postgres


@asynccontextmanager
async def opened(url: str, pool_size: int = 3, statement_timeout_ms: int = 30_000) -> AsyncIterator[Database]:
    settings = DatabaseSettings(url=url, pool_size=pool_size, statement_timeout_ms=statement_timeout_ms)
    database = await connect(settings)
    try:
        yield database
    finally:
        await database.close()


async def ask(url: str, statement: str) -> object:
    """Run one statement on a connection of its own."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def pid_of(tx: Tx) -> int:
    pid: int = (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    return pid


async def kill(url: str, pid: int) -> None:
    """End a server process and wait until it is gone."""
    await ask(url, f"SELECT pg_terminate_backend({pid}, 10000)")


async def loop_turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def cancel_before_its_reply(
    proxy: LossyProxy, work: Coroutine[Any, Any, None], held: bytes, cancels: int
) -> None:
    """Run the work until the server has answered what contains `held`, and cancel it before the answer arrives."""
    proxy.hold = held
    task = asyncio.create_task(work)
    await asyncio.wait_for(proxy.held.wait(), 20)
    proxy.hold = None
    for _ in range(cancels):
        task.cancel()
        await loop_turns(50)
    proxy.release.set()
    await asyncio.wait([task], timeout=20)
    assert task.cancelled()


async def works(database: Database) -> bool:
    try:
        async with database.transaction() as tx:
            await tx.execute(text("SELECT 1"))
    except Unavailable:
        return False
    return True


async def test_a_database_that_may_lose_commits_is_refused_by_name(postgres_name: str, postgres_url: str) -> None:
    await ask(postgres_url, f'ALTER DATABASE "{postgres_name}" SET synchronous_commit = off')
    with pytest.raises(UnsafeDatabase, match="synchronous_commit=off"):
        await connect(DatabaseSettings(url=postgres_url))

    await ask(postgres_url, f'ALTER DATABASE "{postgres_name}" SET synchronous_commit = on')
    async with opened(postgres_url) as database:
        assert await works(database)


async def test_a_server_that_does_not_sync_is_refused_by_name() -> None:
    require_postgres()
    with PostgresServer(settings={"fsync": "off"}) as server, pytest.raises(UnsafeDatabase, match="fsync=off"):
        await connect(DatabaseSettings(url=server.url("postgres")))


async def test_a_refused_opening_leaves_no_connection_behind(postgres_name: str, postgres_url: str) -> None:
    await ask(postgres_url, f'ALTER DATABASE "{postgres_name}" SET synchronous_commit = off')
    with pytest.raises(UnsafeDatabase):
        await connect(DatabaseSettings(url=postgres_url))

    async def gone() -> bool:
        return await ask(postgres_url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'holdfast'") == 0

    await eventually(gone, "the connections are closed")


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))  # bound and not listening: nobody answers, and nobody else can
        with pytest.raises(Unavailable, match="cannot be reached"):
            await connect(DatabaseSettings(url=f"postgresql://{USER}@{HOST}:{taken.getsockname()[1]}/shop"))


@pytest.mark.parametrize(
    ("sqlstate", "message"),
    [
        ("57P03", "the database system is starting up"),
        ("57P03", "the database system is in recovery mode"),
        ("57P03", "the database system is shutting down"),
        ("53300", "sorry, too many clients already"),
    ],
)
async def test_a_server_that_takes_no_connections_now_is_unavailable(sqlstate: str, message: str) -> None:
    async with RefusingServer(sqlstate, message) as server:
        with pytest.raises(Unavailable, match=message):
            await connect(DatabaseSettings(url=f"postgresql://{USER}@{HOST}:{server.port}/shop"))


async def test_a_server_that_cuts_new_connections_off_is_unavailable() -> None:
    def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(cut, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable):
            await connect(DatabaseSettings(url=f"postgresql://{USER}@{HOST}:{port}/shop"))


@pytest.mark.parametrize(
    ("sqlstate", "message"), [("3D000", 'database "shop" does not exist'), ("28P01", "password authentication failed")]
)
async def test_a_wrong_database_or_password_is_told_in_our_words(sqlstate: str, message: str) -> None:
    async with RefusingServer(sqlstate, message) as server:
        with pytest.raises(HoldfastError, match=message) as caught:
            await connect(DatabaseSettings(url=f"postgresql://{USER}:hunter22@{HOST}:{server.port}/shop"))
    assert "hunter22" not in caught.value.detail


async def test_a_connection_killed_inside_a_transaction_is_unavailable_and_replaced(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        await make_jars(database)

        async def work() -> None:
            async with database.transaction() as tx:
                await put(tx, "never")
                await kill(postgres_url, await pid_of(tx))
                await put(tx, "never either")

        with pytest.raises(Unavailable):
            await work()
        async with database.transaction() as tx:
            await put(tx, "after")
        assert await content(database) == {"after": 0}


@pytest.mark.parametrize("snapshot", [True, False])
async def test_a_connection_killed_inside_a_read_is_unavailable_and_replaced(postgres_url: str, snapshot: bool) -> None:
    async with opened(postgres_url) as database:
        await make_jars(database, "a")

        async def work() -> None:
            async with database.read(snapshot=snapshot) as tx:
                await kill(postgres_url, await pid_of(tx))
                await seen(tx)

        with pytest.raises(Unavailable):
            await work()
        assert await content(database) == {"a": 0}


async def test_a_connection_killed_before_the_commit_never_counts_as_committed(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        await make_jars(database)
        woken: list[str] = []

        async def work() -> None:
            async with database.transaction() as tx:
                tx.on_commit(lambda: woken.append("x"))
                await put(tx, "never")
                await kill(postgres_url, await pid_of(tx))

        with pytest.raises((OutcomeUnknown, Unavailable)):
            await work()
        assert woken == []
        assert await content(database) == {}


async def test_the_pool_heals_after_all_its_connections_were_killed(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        async with AsyncExitStack() as stack:
            opens = [await stack.enter_async_context(database.transaction()) for _ in range(3)]
            pids = [await pid_of(tx) for tx in opens]
        for pid in pids:
            await kill(postgres_url, pid)

        outcomes = [await works(database) for _ in range(5)]
        assert outcomes.count(False) <= 3
        assert outcomes[3:] == [True, True]


@pytest.mark.parametrize("before_commit", [False, True])
async def test_a_lost_reply_to_commit_is_an_unknown_outcome(
    postgres_server: PostgresServer, postgres_name: str, before_commit: bool
) -> None:
    """The caller cannot tell the two cases apart, and is told so; the row is there in one of them."""
    async with LossyProxy(postgres_server.port) as proxy:
        through_proxy = f"postgresql://{USER}@{HOST}:{proxy.port}/{postgres_name}"
        async with opened(through_proxy) as database:
            await make_jars(database)
            proxy.before_commit = before_commit
            woken: list[str] = []

            async def work() -> None:
                async with database.transaction() as tx:
                    tx.on_commit(lambda: woken.append("x"))
                    await put(tx, "a")
                    proxy.armed = True

            with pytest.raises(OutcomeUnknown) as caught:
                await work()
            assert caught.value.__cause__ is not None
            assert woken == []
            assert proxy.swallowed == (0 if before_commit else 1)
            assert await content(database) == ({} if before_commit else {"a": 0})


@pytest.mark.parametrize(
    ("told_before", "expected"), [("BEGIN", Unavailable), ("a statement", Unavailable), ("COMMIT", OutcomeUnknown)]
)
async def test_a_server_that_said_goodbye_and_has_not_hung_up_yet_is_away(
    postgres_server: PostgresServer, postgres_name: str, told_before: str, expected: type[HoldfastError]
) -> None:
    """The driver then has an error of its own for whoever uses the connection in that moment."""
    async with LossyProxy(postgres_server.port) as proxy:
        through_proxy = f"postgresql://{USER}@{HOST}:{proxy.port}/{postgres_name}"
        async with opened(through_proxy, pool_size=1) as database:
            await make_jars(database)

            async def goodbye(moment: str) -> None:
                if moment == told_before:
                    proxy.say(fatal("57P01", "terminating connection due to administrator command"))
                    await loop_turns(50)

            async def work() -> None:
                await goodbye("BEGIN")
                async with database.transaction() as tx:
                    await put(tx, "a")
                    await goodbye("a statement")
                    await put(tx, "b")
                    await goodbye("COMMIT")

            with pytest.raises(expected):
                await work()
            async with asyncio.timeout(20):
                assert await content(database) == {}  # on another connection: that one is of no more use


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize("held", ["BEGIN", "INSERT", "COMMIT"])
async def test_a_transaction_cancelled_before_a_reply_came_leaves_no_half_open_one_to_the_next(
    postgres_server: PostgresServer, postgres_name: str, postgres_url: str, held: str, cancels: int
) -> None:
    """Else the next transaction is nested in the abandoned one, and its COMMIT commits nothing."""
    async with LossyProxy(postgres_server.port) as proxy:
        through_proxy = f"postgresql://{USER}@{HOST}:{proxy.port}/{postgres_name}"
        async with opened(through_proxy, pool_size=1) as database:
            await make_jars(database)

            async def work() -> None:
                async with database.transaction() as tx:
                    await put(tx, "left")
                    await put(tx, "right")

            await cancel_before_its_reply(proxy, work(), held.encode(), cancels)

            async with asyncio.timeout(20), database.transaction() as tx:
                await put(tx, "after")
            assert await ask(postgres_url, "SELECT count(*) FROM jar WHERE name = 'after'") == 1, "said, not committed"
            halves = await ask(postgres_url, "SELECT count(*) FROM jar WHERE name <> 'after'")
            assert halves in ((0, 2) if held == "COMMIT" else (0,))


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize("snapshot", [True, False])
async def test_a_read_cancelled_before_a_reply_came_leaves_the_connection_usable(
    postgres_server: PostgresServer, postgres_name: str, snapshot: bool, cancels: int
) -> None:
    async with LossyProxy(postgres_server.port) as proxy:
        through_proxy = f"postgresql://{USER}@{HOST}:{proxy.port}/{postgres_name}"
        async with opened(through_proxy, pool_size=1) as database:
            await make_jars(database, "a")

            async def work() -> None:
                async with database.read(snapshot=snapshot) as tx:
                    await seen(tx)

            await cancel_before_its_reply(proxy, work(), b"SELECT jar", cancels)

            async with asyncio.timeout(20):
                assert await content(database) == {"a": 0}
                async with database.transaction() as tx:
                    assert await seen(tx) == {"a": 0}


async def test_a_statement_that_runs_too_long_is_unavailable(postgres_url: str) -> None:
    async with opened(postgres_url, statement_timeout_ms=100) as database:
        with pytest.raises(Unavailable):
            async with database.transaction() as tx:
                await tx.execute(text("SELECT pg_sleep(60)"))
        assert await works(database)


async def test_a_lock_that_is_held_too_long_is_unavailable(postgres_url: str) -> None:
    async with opened(postgres_url) as holder, opened(postgres_url, statement_timeout_ms=100) as waiter:
        await make_jars(holder)
        async with holder.transaction() as tx:
            await put(tx, "a")
            with pytest.raises(Unavailable):
                async with waiter.transaction() as other:
                    await put(other, "a")


async def test_a_cancelled_statement_gives_a_usable_connection_back(postgres_url: str) -> None:
    async with opened(postgres_url, pool_size=1) as database:
        await make_jars(database)

        async def work() -> None:
            async with database.transaction() as tx:
                await put(tx, "never")
                await tx.execute(text("SELECT pg_sleep(600)"))

        async def sleeps() -> bool:
            return await ask(postgres_url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == 1

        async def awake() -> bool:
            return not await sleeps()

        task = asyncio.create_task(work())
        await eventually(sleeps, "the statement runs")
        task.cancel()
        await asyncio.wait([task], timeout=20)
        assert task.cancelled()
        async with asyncio.timeout(20), database.transaction() as tx:
            assert await seen(tx) == {}
        await eventually(awake, "the server has stopped the statement")


async def test_a_crash_of_the_server_is_unavailable_and_heals(own_server: PostgresServer) -> None:
    name = own_server.create_database()
    async with opened(own_server.url(name)) as database:
        await make_jars(database, "before")

        async def crashed_in_the_middle() -> None:
            async with database.transaction() as tx:
                await put(tx, "never")
                own_server.crash()
                await put(tx, "never either")

        try:
            with pytest.raises(Unavailable):
                await crashed_in_the_middle()
            with pytest.raises(Unavailable):
                await content(database)
        finally:
            own_server.restart()

        await eventually(lambda: works(database), "the pool heals")
        assert await content(database) == {"before": 0}


async def test_two_transactions_that_wait_for_each_other_are_a_conflict_for_one(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        await make_jars(database, "a", "b")
        locked = [asyncio.Event(), asyncio.Event()]

        async def work(number: int) -> str:
            async with database.transaction() as tx:
                order = ["a", "b"] if number == 0 else ["b", "a"]
                lock = text("SELECT beans FROM jar WHERE name = :name FOR UPDATE")
                await tx.execute(lock, {"name": order[0]})
                locked[number].set()
                await locked[1 - number].wait()
                await tx.execute(lock, {"name": order[1]})
            return "done"

        answers = await asyncio.gather(work(0), work(1), return_exceptions=True)
        told = sorted(answer.code if isinstance(answer, HoldfastError) else str(answer) for answer in answers)
        assert told == ["conflict", "done"]
