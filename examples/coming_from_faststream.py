"""Coming from FastStream: a subscriber that publishes, a dependency, a lifespan. See docs/from-faststream.md.

Run it with `python examples/coming_from_faststream.py`: on a throw-away SQLite file, or on the postgresql:// URL that
you give. It tests itself in memory first.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from sqlalchemy import text

import holdfast
from holdfast.messaging import testing

# -- the program ------------------------------------------------------------------------------------------------------


class Order(msgspec.Struct, frozen=True):
    number: int
    address: str


class Shipment(msgspec.Struct, frozen=True):
    order: int


TYPES = {"order": Order, "shipment": Shipment}
TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="orders"), holdfast.Queue(name="shipments")])


class Carrier:
    """The client of a neighbour, opened for each call."""

    async def label(self, order: int) -> str:
        return f"label of order {order}"


@asynccontextmanager
async def carrier() -> AsyncIterator[Carrier]:
    yield Carrier()


def packing(bus: holdfast.Messaging) -> holdfast.Listen:
    async def pack(tx: holdfast.Tx, order: Order) -> None:
        if not order.address:
            raise holdfast.Reject(f"order {order.number} has no address")
        await tx.execute(text("INSERT INTO packed (number) VALUES (:number)"), {"number": order.number})
        await bus.outbox.add(tx, "", "shipments", Shipment(order=order.number))

    return holdfast.Listen(name="packing", queue="orders", handlers=[pack])


async def ship(shipment: Shipment, carrier: Carrier) -> None:
    print(await carrier.label(shipment.order))


SHIPPING = holdfast.Listen(
    name="shipping", queue="shipments", handlers=[ship], provide={Carrier: holdfast.PerMessage(carrier)}
)


@asynccontextmanager
async def running(url: str) -> AsyncIterator[holdfast.Messaging]:
    """The lifespan: what is opened here is open for handlers and senders, and closed after the last handler ended."""
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    try:
        await holdfast.migrate(database, [holdfast.HISTORY])
        async with database.transaction() as tx:
            await tx.execute(text("CREATE TABLE IF NOT EXISTS packed (number INTEGER PRIMARY KEY)"))
        async with holdfast.open_messaging(database, TYPES, TOPOLOGY) as bus:
            bus.listen(packing(bus))
            bus.listen(SHIPPING)
            yield bus
    finally:
        await database.close()


async def main(url: str) -> None:
    async with running(url) as bus:
        await bus.publisher.publish("", "orders", Order(number=7, address="1 Main Street"))
        while (await bus.transport.stats("orders")).total + (await bus.transport.stats("shipments")).total:
            await asyncio.sleep(0.01)


# -- its test ---------------------------------------------------------------------------------------------------------


async def test_an_order_is_packed_once_and_shipped() -> None:
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        async with bus.database.transaction() as tx:
            await tx.execute(text("CREATE TABLE packed (number INTEGER PRIMARY KEY)"))
        bus.faults.duplicate("orders")
        bus.listen(packing(bus))
        await bus.publisher.publish("", "orders", Order(number=1, address="1 Main Street"))
        await bus.idle()
        assert await bus.messages("shipments") == [Shipment(order=1)]


if __name__ == "__main__":
    asyncio.run(test_an_order_is_packed_once_and_shipped())
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
