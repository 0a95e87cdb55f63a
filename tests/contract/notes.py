"""What the tests of messaging share: notes to send, a system that knows them, and ways to look at what became of them.

Only this module looks past the Transport protocol: a backend that keeps its messages elsewhere needs no other change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
from sqlalchemy import CheckConstraint, Column, Integer, MetaData, Table, Text, func, insert, select, text

from holdfast.bootstrap import System, migrate_all, running
from holdfast.clock import US_PER_S, Clock, ManualClock
from holdfast.db.database import Tx
from holdfast.db.postgres import PostgresDatabase
from holdfast.errors import InvalidInput, PublishError
from holdfast.messaging.codec import Codec
from holdfast.messaging.listen import Effect, Listen, Plain
from holdfast.messaging.message import Delivery, Message, Outgoing, ack
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.retry import NO_RETRY, RetryPolicy
from holdfast.messaging.tables import parked
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.messaging.transport import Subscription
from holdfast.messaging.transports.sql.subscription import SqlSubscription
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually

EXCHANGE = "notes"
QUEUE = "notes.work"
KEY = "note.written"

TOPOLOGY = Topology(
    exchanges=[Exchange(name=EXCHANGE, kind="topic")],
    queues=[Queue(name=QUEUE)],
    bindings=[Binding(exchange=EXCHANGE, queue=QUEUE, routing_key="note.#")],
)

ONCE = NO_RETRY


class Note(msgspec.Struct, frozen=True):
    """A body of a message."""

    text: str


class Memo(msgspec.Struct, frozen=True):
    """A body of another type."""

    text: str


class Ticket(msgspec.Struct, frozen=True):
    """A body with a rule of its own, which speaks by the house's error."""

    seats: int

    def __post_init__(self) -> None:
        if self.seats < 1:
            raise InvalidInput("a ticket has at least one seat")


TYPES: dict[str, type[msgspec.Struct]] = {"test.note": Note, "test.memo": Memo, "test.ticket": Ticket}


# -- systems ----------------------------------------------------------------------------------------------------------


async def office(start_system: StartSystem, settings: Settings | None = None, clock: Clock | None = None) -> System:
    """A system without workers that knows notes and has a queue for them; it stops when the test ends."""
    return await _equipped(await start_system(settings, work=False, clock=clock))


@asynccontextmanager
async def opened(settings: Settings, clock: Clock | None = None) -> AsyncIterator[System]:
    """The same for a block, for tests that stop one system and start the next."""
    await migrate_all(settings)
    async with running(settings, clock=clock) as system:
        yield await _equipped(system)


async def _equipped(system: System) -> System:
    bus, codec = system.messaging, Codec(TYPES)
    await bus.transport.declare(TOPOLOGY)
    bus = msgspec.structs.replace(
        bus,
        codec=codec,
        outbox=Outbox(bus.transport, codec, bus.clock, bus.ids),
        publisher=Publisher(bus.transport, codec, bus.clock, bus.ids, RetryPolicy(tries=1)),
    )
    return msgspec.structs.replace(system, messaging=bus)


def with_messaging(settings: Settings, **changes: int) -> Settings:
    """The settings with other `[messaging]` values."""
    return msgspec.structs.replace(settings, messaging=msgspec.structs.replace(settings.messaging, **changes))


def needs_several_processes(system: System) -> None:
    """Skip where one process is all there may be."""
    if not system.transport.features.several_processes:
        pytest.skip(f"{system.transport.features.name}: one process by design (Features.several_processes)")


def needs_shared_database(system: System) -> None:
    """Skip where messages do not live in the user's own database."""
    if not system.transport.features.shares_database:
        pytest.skip(f"{system.transport.features.name}: not in the user's database (Features.shares_database)")


# -- sending and taking -----------------------------------------------------------------------------------------------


def note(
    system: System,
    body: str = "hello",
    *,
    exchange: str = EXCHANGE,
    key: str = KEY,
    message_id: str | None = None,
    delay_ms: int = 0,
    mandatory: bool = True,
    cancel_key: str | None = None,
) -> Outgoing:
    """A note ready to be published."""
    properties, encoded = Codec(TYPES).encode(Note(body))
    message = Message(
        exchange=exchange,
        routing_key=key,
        body=encoded,
        message_id=message_id or system.ids.message_id(),
        timestamp_us=system.clock.now_us(),
        type=properties.type,
    )
    return Outgoing(message=message, delay_ms=delay_ms, mandatory=mandatory, cancel_key=cancel_key)


def raw(outgoing: Outgoing, **changes: Any) -> Outgoing:
    """The same message with other properties."""
    return msgspec.structs.replace(outgoing, message=msgspec.structs.replace(outgoing.message, **changes))


async def send(system: System, *bodies: str, **options: Any) -> list[str]:
    """Publish notes in one batch, all of which must be confirmed; answers their message ids."""
    batch = [note(system, body, **options) for body in bodies]
    await publish(system, batch)
    return [outgoing.message.message_id for outgoing in batch]


async def publish(system: System, batch: Sequence[Outgoing]) -> None:
    """Publish a batch that must be confirmed."""
    assert await system.transport.publish(batch) == [None] * len(batch)


async def outcome(system: System, outgoing: Outgoing) -> PublishError | None:
    """Publish one message and answer what became of it."""
    (problem,) = await system.transport.publish([outgoing])
    return problem


async def take(subscription: Subscription, count: int = 1) -> list[Delivery]:
    """Take until there are so many deliveries; never more than that may come."""
    deliveries: list[Delivery] = []
    async with asyncio.timeout(WAIT_S):
        while len(deliveries) < count:
            deliveries += await subscription.take()
    assert len(deliveries) == count
    return deliveries


def read(delivery: Delivery) -> str:
    """The text of the note that was delivered."""
    return msgspec.json.decode(delivery.message.body, type=Note).text


def texts(deliveries: Sequence[Delivery]) -> list[str]:
    return [read(delivery) for delivery in deliveries]


async def counts(system: System, queue: str = QUEUE) -> tuple[int, int, int]:
    """Ready, unacked and delayed messages of the queue."""
    stats = await system.transport.stats(queue)
    return stats.ready, stats.unacked, stats.delayed


async def counts_become(system: System, wanted: tuple[int, int, int], queue: str = QUEUE) -> None:
    """Wait until the queue has so many ready, unacked and delayed messages."""

    async def reached() -> bool:
        return await counts(system, queue) == wanted

    await eventually(reached, f"{queue} has (ready, unacked, delayed) = {wanted}")


def vanish(subscription: Subscription) -> None:
    """Let the holder die without a word: nothing is settled, given back or renewed any more."""
    assert isinstance(subscription, SqlSubscription)
    assert subscription._renewal is not None
    subscription._renewal.cancel()


class Reader:
    """Takes notes from the queue and acks them, until told to stop."""

    def __init__(self, system: System, *, prefetch: int = 5) -> None:
        self.got: list[str] = []
        self._subscription: Subscription = system.transport.subscribe(QUEUE, prefetch=prefetch)
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        async with self._subscription:
            while deliveries := await self._subscription.take():
                self.got += texts(deliveries)
                await self._subscription.settle([ack(each) for each in deliveries])

    async def stop(self) -> None:
        self._subscription.stop()
        await self._task


# -- listening --------------------------------------------------------------------------------------------------------


def plainly(
    handler: Plain, name: str = "reader", *, local: RetryPolicy = ONCE, durable: RetryPolicy = ONCE, **options: Any
) -> Listen:
    """A listener whose plain handler gets the notes one by one; it tries once unless told otherwise."""
    return Listen(name=name, queue=QUEUE, plain={Note: handler}, local=local, durable=durable, **options)


def effectively(
    effect: Effect, name: str = "reader", *, local: RetryPolicy = ONCE, durable: RetryPolicy = ONCE, **options: Any
) -> Listen:
    """A listener whose effect gets the notes in batches; it tries once unless told otherwise."""
    return Listen(name=name, queue=QUEUE, effects={Note: effect}, local=local, durable=durable, **options)


# -- time -------------------------------------------------------------------------------------------------------------


def manual_clock() -> ManualClock:
    """A clock in the time of our ids that moves only when told to."""
    return ManualClock(1_770_000_000 * US_PER_S)


async def turn(system: System) -> None:
    """Let everything that can happen now happen: what was woken hands in its request, and the writer decides it.

    The writer takes requests in order of arrival: a message for nobody is decided after all that stood before it.
    """
    for _ in range(3):
        await _loop_turns()
        await publish(system, [note(system, exchange="", key="nobody", mandatory=False)])
        if isinstance(system.database, PostgresDatabase):  # claims and acks go beside the writer there
            while system.database.singles:  # noqa: ASYNC110  # whose end nobody tells
                await asyncio.sleep(0.001)
    await _loop_turns()  # who has just been answered goes to sleep before the clock moves


async def _loop_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def pass_time(system: System, clock: ManualClock, seconds: float) -> None:
    """Move the clock, with everything before and after it done."""
    await turn(system)
    clock.advance(seconds)
    await turn(system)


# -- the database behind it -------------------------------------------------------------------------------------------


class _Undo(Exception):
    """Ends a transaction that must not commit."""


@asynccontextmanager
async def rolled_back(system: System) -> AsyncIterator[Tx]:
    """A transaction that does not commit, although nothing in it failed."""
    with suppress(_Undo):
        async with system.database.transaction() as tx:
            yield tx
            raise _Undo


def deaf_twin(system: System) -> SqlTransport:
    """A transport on the same database whose wake-ups reach nobody."""
    return SqlTransport(system.database, system.group, system.clock, system.ids, system.settings.messaging)


async def hear_each_other(system: System, systems: int) -> None:
    """Wait until so many systems listen for each other's wake-ups."""
    theirs = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"

    async def listening() -> bool:
        async with system.database.read() as tx:
            return int((await tx.execute(text(theirs))).scalar_one()) == systems

    await eventually(listening, f"{systems} systems listen")


class Parked(msgspec.Struct, frozen=True):
    """A message that was given up on."""

    message_id: str
    body: bytes
    attempt: int
    reason: str


async def parked_messages(system: System, queue: str = QUEUE) -> list[Parked]:
    """What was given up on, oldest first."""
    statement = select(parked.c.message_id, parked.c.body, parked.c.attempt, parked.c.reason)
    async with system.database.read() as tx:
        rows = await tx.execute(statement.where(parked.c.queue == queue).order_by(parked.c.id))
        return [Parked(row.message_id, row.body, row.attempt, row.reason) for row in rows]


async def parked_everywhere(system: System) -> list[tuple[str, str]]:
    """The queue and message id of everything that was given up on, sorted."""
    async with system.database.read() as tx:
        rows = await tx.execute(select(parked.c.queue, parked.c.message_id))
        return sorted((row.queue, row.message_id) for row in rows)


async def parks(system: System, count: int = 1) -> list[Parked]:
    """Wait until so many messages were given up on; answers them."""

    async def reached() -> bool:
        return len(await parked_messages(system)) == count

    await eventually(reached, f"{count} messages are parked")
    return await parked_messages(system)


_metadata = MetaData()
# No unique key: a second effect must show, not be refused.
_ledger = Table(
    "test_ledger",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("text", Text, CheckConstraint("text <> 'refused by the database'", name="ck_test_ledger_text")),
)
_keys = Table("test_key", _metadata, Column("key", Text, primary_key=True))


class Ledger:
    """Business rows: each entry is one effect that happened."""

    def __init__(self, system: System) -> None:
        self._database = system.database

    @classmethod
    async def of(cls, system: System) -> Ledger:
        """The ledger in the system's database, created if need be."""
        async with system.database.transaction() as tx:
            await tx.connection.run_sync(_metadata.create_all)
        return cls(system)

    @staticmethod
    async def write(tx: Tx, notes: Sequence[Note]) -> None:
        """The effect itself."""
        await tx.execute(insert(_ledger), [{"text": each.text} for each in notes])

    @staticmethod
    async def write_once(tx: Tx, key: str) -> None:
        """An effect with a business key, which the database refuses the second time."""
        await tx.execute(insert(_keys), [{"key": key}])

    async def entries(self) -> list[str]:
        """Every effect that happened, in order."""
        async with self._database.read() as tx:
            return list((await tx.execute(select(_ledger.c.text).order_by(_ledger.c.id))).scalars())

    async def holds(self, count: int) -> None:
        """Wait until so many effects happened."""

        async def reached() -> bool:
            async with self._database.read() as tx:
                return int((await tx.execute(select(func.count()).select_from(_ledger))).scalar_one()) >= count

        await eventually(reached, f"{count} effects in the ledger")
