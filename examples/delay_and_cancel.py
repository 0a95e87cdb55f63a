"""Delays: a message for later, one taken back in the transaction that makes it needless, one moved.

Run it with `python examples/delay_and_cancel.py`: on a throw-away SQLite file, or on the postgresql:// URL that you
give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec
from sqlalchemy import text

import holdfast


class CloseUnpaid(msgspec.Struct, frozen=True):
    """Half an hour without a payment: give the seats back."""

    order: str


TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="orders.timeout")])
HALF_AN_HOUR_MS = 1_800_000
A_MOMENT_MS = 300


async def place(bus: holdfast.Messaging, tx: holdfast.Tx, order: str) -> None:
    await tx.execute(text("INSERT INTO shop_order VALUES (:id, 'pending')"), {"id": order})
    body = CloseUnpaid(order=order)
    await bus.outbox.add(tx, "", "orders.timeout", body, delay_ms=HALF_AN_HOUR_MS, cancel_key=f"close:{order}")


async def pay(bus: holdfast.Messaging, tx: holdfast.Tx, order: str) -> None:
    await tx.execute(text("UPDATE shop_order SET state = 'paid' WHERE id = :id"), {"id": order})
    taken_back = await bus.outbox.cancel(tx, f"close:{order}")
    print(f"{order}: paid, {taken_back} time-out taken back")


async def shorten(bus: holdfast.Messaging, tx: holdfast.Tx, order: str) -> None:
    moved = await bus.outbox.move(tx, f"close:{order}", delay_ms=A_MOMENT_MS)
    print(f"{order}: {moved} time-out moved from half an hour to {A_MOMENT_MS} ms")


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with database.transaction() as tx:
        await tx.execute(text("CREATE TABLE shop_order (id TEXT PRIMARY KEY, state TEXT)"))

    async with holdfast.open_messaging(database, {"close.unpaid": CloseUnpaid}, TOPOLOGY) as bus:
        closed = asyncio.Event()

        async def close(tx: holdfast.Tx, late: CloseUnpaid) -> None:
            unpaid = text("UPDATE shop_order SET state = 'closed' WHERE id = :id AND state = 'pending'")
            await tx.execute(unpaid, {"id": late.order})
            tx.on_commit(closed.set)

        bus.listen(holdfast.Listen(name="close", queue="orders.timeout", handlers=[close]))
        async with database.transaction() as tx:
            await place(bus, tx, "order 1")
            await place(bus, tx, "order 2")
        print("waiting:", ", ".join(str(each.cancel_key) for each in await bus.pending(queue="orders.timeout")))
        async with database.transaction() as tx:
            await pay(bus, tx, "order 1")
            await shorten(bus, tx, "order 2")
        await asyncio.wait_for(closed.wait(), 10)
        left = await bus.transport.stats("orders.timeout")

    async with database.read() as tx:
        orders = (await tx.execute(text("SELECT id, state FROM shop_order ORDER BY id"))).all()
    print(", ".join(f"{each.id} {each.state}" for each in orders), f"and {left.delayed} messages wait")
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
