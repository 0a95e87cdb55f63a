"""An effect: a handler that asks for `Tx` runs in the transaction of inbox and ack; what comes twice counts once.

Run it with `python examples/effect_once.py`: on a throw-away SQLite file, or on the postgresql:// URL that you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec
from sqlalchemy import text

import holdfast


class Deposit(msgspec.Struct, frozen=True):
    """Money came in."""

    account: str
    amount_minor: int


class Booked(msgspec.Struct, frozen=True):
    """What the account holder is told."""

    account: str
    balance_minor: int


TYPES = {"deposit": Deposit, "booked": Booked}
TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="deposits"), holdfast.Queue(name="notices")])


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with database.transaction() as tx:
        await tx.execute(text("CREATE TABLE account (name TEXT PRIMARY KEY, balance_minor INTEGER)"))
        await tx.execute(text("INSERT INTO account VALUES ('ann', 0)"))

    async with holdfast.open_messaging(database, TYPES, TOPOLOGY) as bus:

        async def book(tx: holdfast.Tx, deposit: Deposit) -> None:
            update = text("UPDATE account SET balance_minor = balance_minor + :amount WHERE name = :name RETURNING *")
            row = (await tx.execute(update, {"amount": deposit.amount_minor, "name": deposit.account})).one()
            # The notice shares the fate of the booking: both are written with the ack, or neither is.
            await bus.outbox.add(tx, "", "notices", Booked(account=row.name, balance_minor=row.balance_minor))

        sent = await bus.publisher.publish("", "deposits", Deposit(account="ann", amount_minor=500))
        await bus.publisher.publish("", "deposits", Deposit(account="ann", amount_minor=500), message_id=sent)
        print("waiting:", (await bus.transport.stats("deposits")).ready, "copies of one message")

        bus.listen(holdfast.Listen(name="bank", queue="deposits", handlers=[book]))
        while (await bus.transport.stats("deposits")).total:
            await asyncio.sleep(0.01)
        notices = await bus.transport.stats("notices")

    async with database.read() as tx:
        balance = (await tx.execute(text("SELECT balance_minor FROM account"))).scalar_one()
    print(f"balance: {balance}, notices: {notices.ready}")
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
