"""Row H39 of the capability table on SQL: at each of the seven points where a message can get lost, none does.

PostgreSQL is the broker here. On SQLite broker and process are one: there is nothing to connect to, and the broker's
crash is the consumer's. Each round injects its fault once more; then every committed event had its effect once, nothing
waits and nothing was given up on.
"""
# ruff: noqa: N802  # the row keeps its name

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url, text

from holdfast.db.database import Tx
from holdfast.errors import HoldfastError, NoSuchExchange, Unroutable
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually, quick_settings
from tests.contract.notes import QUEUE, Ledger, Note, office, opened, with_messaging
from tests.faults.conftest import Scenario, Times
from tests.faults.crowd import History
from tests.faults.losses import Events, consumer, events_of
from tests.faults.note_worker import DOT
from tests.servers.postgres import PostgresServer

pytestmark = pytest.mark.torture

ROOT = Path(__file__).parents[2]
EVENTS = 12  # in each round
KEY = "late"
KILLED_AGAIN = 0.2


class Refusal(Exception):
    """What a handler fails with."""


async def judge(scenario: Scenario, rounds: int, events: Events, found: list[str]) -> None:
    """Note the outcome; fails with the violations if there are any."""
    print(f"{len(await events.committed())} events committed; callers were told {dict(events.failures)}")
    scenario.judge(rounds, History(), found)


# -- 1: the connection cannot be made -------------------------------------------------------------------------------


async def test_H39_connect_fails(postgres_to_crash: PostgresServer, scenario: Scenario, times: Times) -> None:
    url = postgres_to_crash.url(postgres_to_crash.create_database())
    found: list[str] = []
    rounds = times(3, 50)
    async with opened(quick_settings(url)) as system:
        events = await events_of(system, random.Random(scenario.seed))
        for _ in range(rounds):
            await asyncio.to_thread(postgres_to_crash.crash)
            told = events.failures.total()
            sending = asyncio.create_task(events.send(EVENTS))
            await all_are_told(events, told + EVENTS)
            await asyncio.to_thread(postgres_to_crash.restart)
            await sending
            found += await events.violations()
        await judge(scenario, rounds, events, found)
    assert set(events.failures) <= {"publish_rejected", "unavailable"}  # known not to be stored, since nobody listened


async def all_are_told(events: Events, failures: int) -> None:
    """Wait until callers were told of so many failures."""

    async def told() -> bool:
        return events.failures.total() >= failures

    await eventually(told, f"callers are told of {failures} failures")


# -- 2 and 3: no exchange, no queue ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["exchange", "queue"])
async def test_H39_no_exchange_or_no_queue(
    start_system: StartSystem, scenario: Scenario, times: Times, missing: str
) -> None:
    system = await office(start_system)
    events = await events_of(system, random.Random(scenario.seed))
    found: list[str] = []
    rounds = times(3, 50)
    refusal: type[HoldfastError] = NoSuchExchange if missing == "exchange" else Unroutable
    for number in range(rounds):
        exchange = Exchange(name=f"late-{number}")
        if missing == "queue":
            await system.transport.declare(Topology(exchanges=[exchange]))
        committed = await events.committed()
        published, added = events.names(2)
        for way, name in ((events.publish, published), (events.commit, added)):
            with pytest.raises(refusal):
                await way(name, exchange.name, KEY)
        assert await events.committed() == committed  # told that it is not stored, and it is not
        assert (await system.transport.stats(QUEUE)).total == 0
        binding = Binding(exchange=exchange.name, queue=QUEUE, routing_key=KEY)
        repaired = Topology(exchanges=[exchange], queues=[Queue(name=QUEUE)], bindings=[binding])
        await system.transport.declare(repaired)
        await events.publish(published, exchange.name, KEY)
        await events.commit(added, exchange.name, KEY)
        assert set(await events.committed()) == {*committed, published, added}
        found += await events.violations()
    await judge(scenario, rounds, events, found)


# -- 4: the broker fails in the middle ------------------------------------------------------------------------------


class Cutter:
    """Ends the server process of a transaction in the middle of it, once whenever it is armed."""

    def __init__(self, url: str) -> None:
        self.armed = False
        self.struck = 0
        self._url = url.replace("+asyncpg", "")

    async def __call__(self, tx: Tx) -> None:
        if not self.armed:
            return
        pid = (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        if self.armed:  # nobody was quicker
            self.armed = False
            self.struck += 1
            await self._ask(f"SELECT pg_terminate_backend({pid}, 10000)")

    async def decide(self, tx: Tx, requests: Sequence[None]) -> list[HoldfastError | None]:
        """The same as a request to a writer, whose batch this strikes."""
        await self(tx)
        return [None for _ in requests]

    async def all(self) -> None:
        """End every other server process of the database."""
        await self._ask(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    async def _ask(self, statement: str) -> None:
        connection = await asyncpg.connect(self._url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


async def test_H39_broker_error(postgres_url: str, scenario: Scenario, times: Times) -> None:
    """Connections are cut between a write and its commit: of a publisher, of a caller, of the consumer; then all."""
    found: list[str] = []
    rounds = times(3, 50)
    chance = random.Random(scenario.seed)
    publishing, sending, handling = cutters = [Cutter(postgres_url) for _ in range(3)]
    async with opened(quick_settings(postgres_url)) as system:
        events = await events_of(system, chance, sending=sending, handling=handling)
        for _ in range(rounds):
            for cutter in cutters:
                cutter.armed = True
            batch = [events.publish(name) for name in events.names(EVENTS)]
            await asyncio.gather(system.group.submit(publishing.decide, None), *batch)  # in one transaction
            await events.send(EVENTS)
            again = asyncio.create_task(events.send(EVENTS))
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            await publishing.all()
            await again
            found += await events.violations()
        await judge(scenario, rounds, events, found)
    assert [cutter.struck for cutter in cutters] == [rounds] * 3
    assert events.failures["outcome_unknown"] >= rounds  # each caller who was cut off before COMMIT was told so


async def test_H39_broker_error_on_sqlite(sqlite_url: str, scenario: Scenario, times: Times) -> None:
    """Somebody else holds the lock of the file."""
    found: list[str] = []
    rounds = times(3, 50)
    async with opened(quick_settings(sqlite_url)) as system:
        events = await events_of(system, random.Random(scenario.seed))
        async with system.database.transaction() as tx:
            await tx.execute(text("PRAGMA busy_timeout = 10"))  # instead of 5 s, to wait less here
        path = make_url(sqlite_url).database or ""
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            for _ in range(rounds):
                await eventually(lambda: locked_by(other), "the lock of the file is free")
                told = events.failures.total()
                sending = asyncio.create_task(events.send(EVENTS))
                await all_are_told(events, told + EVENTS)
                other.execute("ROLLBACK")
                await sending
                found += await events.violations()
        await judge(scenario, rounds, events, found)
    assert set(events.failures) <= {"publish_rejected", "unavailable"}


async def locked_by(other: sqlite3.Connection) -> bool:
    """Take the lock if it is free; without waiting, for who holds it may need this very loop to go on."""
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True


# -- 5: the broker crashes ------------------------------------------------------------------------------------------


async def test_H39_broker_crashes(postgres_to_crash: PostgresServer, scenario: Scenario, times: Times) -> None:
    """PostgreSQL is stopped at once while callers send and the consumer works, and starts again."""
    url = postgres_to_crash.url(postgres_to_crash.create_database())
    found: list[str] = []
    rounds = times(3, 50)
    chance = random.Random(scenario.seed)
    async with opened(quick_settings(url)) as system:
        events = await events_of(system, chance)
        for _ in range(rounds):
            told = events.failures.total()
            calm = asyncio.Event()
            sending = asyncio.create_task(send_until(events, calm))
            await asyncio.sleep(chance.uniform(0.0, 0.2))
            await asyncio.to_thread(postgres_to_crash.crash)
            await all_are_told(events, told + 1)
            await asyncio.to_thread(postgres_to_crash.restart)
            calm.set()
            await sending
            found += await events.violations()
        await judge(scenario, rounds, events, found)


async def send_until(events: Events, calm: asyncio.Event) -> None:
    while not calm.is_set():
        await events.send(EVENTS)


# -- 6: the consumer crashes ----------------------------------------------------------------------------------------


async def test_H39_consumer_crashes(settings: Settings, scenario: Scenario, times: Times) -> None:
    """`kill -9` of the process that handles, at any of its writes; in some rounds of the next one too."""
    found: list[str] = []
    rounds = times(3, 50)
    chance = random.Random(scenario.seed)
    settings = with_messaging(settings, lease_ms=500)
    async with opened(settings) as system:
        events = Events(system, await Ledger.of(system), chance)
    for _ in range(rounds):
        for _ in range(2 if chance.random() < KILLED_AGAIN else 1):
            async with opened(settings) as system:
                await events.move_to(system)
                await events.send(EVENTS)
            await kill_at(settings.database.url, chance.randint(1, EVENTS))
        async with opened(settings) as system:
            await events.move_to(system)
            system.listen(consumer(Ledger.write))
            found += await events.violations()
    async with opened(settings) as system:
        await events.move_to(system)
        await judge(scenario, rounds, events, found)


async def kill_at(url: str, dots: int) -> None:
    """Start a consumer, kill it when it has written so many effects, committed or not."""
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.note_worker", url, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    try:
        async with asyncio.timeout(WAIT_S):
            assert await worker.stdout.readexactly(dots) == DOT * dots
    finally:
        if worker.returncode is None:
            worker.kill()
        await worker.wait()


# -- 7: the consumer's handler fails --------------------------------------------------------------------------------


async def test_H39_consumer_exception(start_system: StartSystem, scenario: Scenario, times: Times) -> None:
    """After its writes the handler raises at random, or the database refuses a further one."""
    found: list[str] = []
    rounds = times(3, 50)
    chance = random.Random(scenario.seed)
    raised = Counter[str]()
    once = ["pass", *chance.sample(["raise", "refused", "published"], 3)]  # so that none of them is left to chance

    async def fail_at_random(tx: Tx) -> None:
        match (
            once.pop() if once else chance.choices(("pass", "raise", "refused", "published"), weights=(6, 2, 1, 1))[0]
        ):
            case "raise":
                raised["raise"] += 1
                raise Refusal
            case "refused":
                raised["refused"] += 1
                await Ledger.write(tx, [Note("refused by the database")])
            case "published":
                raised["published"] += 1
                await system.outbox.add(tx, "nowhere", KEY, Note("never"))

    system = await office(start_system)
    events = await events_of(system, chance, handling=fail_at_random)
    for _ in range(rounds):
        await events.send(EVENTS)
        found += await events.violations()
    await judge(scenario, rounds, events, found)
    assert set(raised) == {"raise", "refused", "published"}
