"""A program of the toolkit that dies: `python -m tests.faults.crashing_worker URL SCENARIO [KIND NUMBER]`.

The boundaries lie before and after each begin, commit, publish and settle, those within an open transaction included;
every claim and business write lies between two of them. NUMBER counts those of one KIND from 1 in the order in which
they come; without both it lives. Status 17: it died there; 0: it came to its end.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import Column, Integer, MetaData, Table, Text, func, insert, select

from holdfast import DatabaseSettings, MessagingSettings, connect, migrate
from holdfast.db.database import Database, Tx
from holdfast.db.prepared import insert as insert_for
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.recover import DeadLetter
from holdfast.messaging.retry import Reject, RetryPolicy
from holdfast.messaging.tables import HISTORY
from holdfast.messaging.toolkit import Messaging, open_messaging
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.messaging.transports.sql.subscription import SqlSubscription
from holdfast.messaging.transports.sql.transport import SqlTransport
from tests.conftest import eventually

Verb = Callable[..., Awaitable[Any]]

DIED = 17
ORDERS = 3
VERBS = ("begin", "commit", "publish_in in a transaction", "settle in a transaction")
MORE_VERBS = {"effects": (), "retry": ("settle",), "dead letter": ("settle", "publish")}
"""What each scenario passes besides; an effect's messages and its ack are written in its transaction."""

metadata = MetaData()
wishes = Table("wish", metadata, Column("number", Integer, primary_key=True))
effects = Table("effect", metadata, Column("id", Integer, primary_key=True), Column("what", Text, nullable=False))


class Placed(msgspec.Struct, frozen=True):
    """The first message."""

    number: int


class Packed(msgspec.Struct, frozen=True):
    """What its effect sends on."""

    number: int


TOPOLOGY = Topology(
    exchanges=[Exchange(name="orders", kind="topic"), Exchange(name="dlx", kind="fanout")],
    queues=[
        Queue(name="placed", dead_letter_exchange="dlx"),
        Queue(name="packed", max_length=100),
        Queue(name="dead", message_ttl_ms=50, dead_letter_exchange="orders", dead_letter_routing_key="packed"),
    ],
    bindings=[
        Binding(exchange="orders", queue="placed", routing_key="placed"),
        Binding(exchange="orders", queue="packed", routing_key="packed"),
        Binding(exchange="dlx", queue="dead"),
    ],
)
TYPES: dict[str, type] = {"placed": Placed, "packed": Packed}
FAST = RetryPolicy(tries=3, interval_ms=10)
ONCE = RetryPolicy(tries=1)
DEAD_LETTER = DeadLetter()


def die_at(database: Database, kind: str, number: int) -> None:
    """Let the process end at the boundary of that kind and number, as `kill -9` would."""
    inner = database.transaction
    passed: Counter[str] = Counter()

    def boundary(here: str) -> None:
        passed[here] += 1
        if here == kind and passed[here] == number:
            os._exit(DIED)

    @asynccontextmanager
    async def transaction() -> AsyncIterator[Tx]:
        boundary("before begin")
        async with inner() as tx:
            boundary("after begin")
            yield tx
            boundary("before commit")
        boundary("after commit")

    database.transaction = transaction  # type: ignore[method-assign]
    for owner, verb in ((SqlTransport, "publish"), (SqlTransport, "publish_in"), (SqlSubscription, "settle")):
        setattr(owner, verb, _between(getattr(owner, verb), verb, boundary))


def _between(inner: Verb, name: str, boundary: Callable[[str], None]) -> Verb:
    """The same verb with a boundary before and one after it; says whether it is called within a transaction."""

    async def verb(*arguments: Any) -> Any:
        within = " in a transaction" if any(isinstance(each, Tx) for each in arguments) else ""
        boundary(f"before {name}{within}")
        answer = await inner(*arguments)
        boundary(f"after {name}{within}")
        return answer

    return verb


async def note(tx: Tx, what: str) -> None:
    await tx.execute(insert(effects).values(what=what))


async def place(bus: Messaging, database: Database, scenario: str) -> None:
    """Each order once, however often this runs: its row and its message commit together, or its message has one id."""
    options: dict[str, Any] = {"delay_ms": 30} if scenario == "retry" else {}
    for number in range(ORDERS):
        if scenario == "dead letter":
            await bus.publisher.publish("orders", "placed", Placed(number), message_id=f"order-{number}")
            continue
        async with database.transaction() as tx:
            fresh = insert_for(tx.dialect, wishes).values(number=number).on_conflict_do_nothing()
            if (await tx.execute(fresh)).rowcount:
                await bus.outbox.add(tx, "orders", "placed", Placed(number), **options)


async def pack(bus: Messaging, tx: Tx, orders: Sequence[Placed]) -> None:
    for order in orders:
        await note(tx, f"placed {order.number}")
        await bus.outbox.add(tx, "orders", "packed", Packed(order.number))


async def packed(tx: Tx, orders: Sequence[Packed]) -> None:
    for order in orders:
        await note(tx, f"packed {order.number}")


def listen(bus: Messaging, scenario: str) -> None:
    """What the scenario's consumers do with the two messages."""

    async def on_placed(tx: Tx, orders: Sequence[Placed]) -> None:
        await pack(bus, tx, orders)

    async def on_placed_failing_once(tx: Tx, orders: Sequence[Placed]) -> None:
        await pack(bus, tx, orders)
        fresh = {order.number for order in orders} - failed
        if len(orders) == 1:  # a batch that fails is split, and only who fails alone is delivered again
            failed.update(fresh)
        if fresh:
            raise RuntimeError("the first time fails, after its writes")

    async def rejected(_: Incoming) -> None:
        raise Reject("to the dead-letter exchange, and back by its time to live")

    async def on_returned(tx: Tx, orders: Sequence[Placed]) -> None:
        for order in orders:
            await note(tx, f"returned {order.number}")

    failed: set[int] = set()
    first = on_placed_failing_once if scenario == "retry" else on_placed
    if scenario == "dead letter":
        bus.listen(Listen(name="placed", queue="placed", plain={Placed: rejected}, recover=DEAD_LETTER))
        bus.listen(Listen(name="returned", queue="packed", effects={Placed: on_returned}, local=FAST))
    else:
        bus.listen(Listen(name="placed", queue="placed", effects={Placed: first}, local=ONCE, durable=FAST))
        bus.listen(Listen(name="packed", queue="packed", effects={Packed: packed}, local=FAST))


async def run(url: str, scenario: str, kind: str = "", number: str = "0") -> None:
    database = await connect(DatabaseSettings(url=url))
    try:
        await migrate(database, [HISTORY])
        async with database.transaction() as tx:
            await tx.connection.run_sync(metadata.create_all)
        die_at(database, kind, int(number))
        settings = MessagingSettings(lease_ms=1_000, poll_ms=50)
        async with open_messaging(database, TYPES, TOPOLOGY, settings=settings) as bus:
            listen(bus, scenario)
            await place(bus, database, scenario)
            await eventually(lambda: done(bus, database, scenario), "all is done")
    finally:
        await database.close()


async def done(bus: Messaging, database: Database, scenario: str) -> bool:
    async with database.read() as tx:
        count = (await tx.execute(select(func.count()).select_from(effects))).scalar_one()
    waiting = [(await bus.transport.stats(queue.name)).total for queue in TOPOLOGY.queues]
    return bool(count >= ORDERS * (1 if scenario == "dead letter" else 2)) and not any(waiting)


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
