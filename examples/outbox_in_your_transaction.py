"""Messages in your own transaction: the row and its message commit together, and the effect happens once.

Run it with `python examples/outbox_in_your_transaction.py`: on a throw-away SQLite file, or on the postgresql:// URL
that you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence

import msgspec
from sqlalchemy import text

import holdfast


class WelcomeWanted(msgspec.Struct, frozen=True):
    """Somebody signed up and should be welcomed."""

    email: str


TOPOLOGY = holdfast.Topology(
    exchanges=[holdfast.Exchange(name="members", kind="topic")],
    queues=[holdfast.Queue(name="welcome.queue")],
    bindings=[holdfast.Binding(exchange="members", queue="welcome.queue", routing_key="member.#")],
)


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with database.transaction() as tx:
        await tx.execute(text("CREATE TABLE member (email TEXT PRIMARY KEY)"))
        await tx.execute(text("CREATE TABLE welcomed (email TEXT PRIMARY KEY)"))

    async with holdfast.open_messaging(database, {"welcome.wanted": WelcomeWanted}, TOPOLOGY) as bus:
        done = asyncio.Event()

        async def welcome(tx: holdfast.Tx, wanted: Sequence[WelcomeWanted]) -> None:
            # In the transaction of the inbox row and the ack: this happens once, however often the message comes.
            rows = [{"email": each.email} for each in wanted]
            await tx.execute(text("INSERT INTO welcomed (email) VALUES (:email)"), rows)
            tx.on_commit(done.set)

        bus.listen(holdfast.Listen(name="welcome", queue="welcome.queue", effects={WelcomeWanted: welcome}))

        try:
            async with database.transaction() as tx:
                await bus.outbox.add(tx, "members", "member.joined", WelcomeWanted(email="nobody@example.org"))
                raise ValueError("changed my mind")
        except ValueError:
            print("rolled back: no row, and no message")

        async with database.transaction() as tx:
            await tx.execute(text("INSERT INTO member (email) VALUES ('ann@example.org')"))
            await bus.outbox.add(tx, "members", "member.joined", WelcomeWanted(email="ann@example.org"))
        await asyncio.wait_for(done.wait(), 10)

    async with database.read() as tx:
        welcomed = list((await tx.execute(text("SELECT email FROM welcomed"))).scalars())
    print("welcomed:", ", ".join(welcomed))
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
