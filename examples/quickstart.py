"""The program of docs/quickstart.md: members join, are counted once each, and get a mail.

Run it with `python examples/quickstart.py EMAIL…`: whoever is named joins, then all that waits is handled. The database
is the one that HOLDFAST_DATABASE names, holdfast.db without it.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
from sqlalchemy import text

import holdfast
from holdfast import observe, settings


class Joined(msgspec.Struct, frozen=True):
    """Somebody became a member."""

    email: str


TYPES = {"member.joined": Joined}
TOPOLOGY = holdfast.Topology(
    exchanges=[holdfast.Exchange(name="members", kind="topic")],
    queues=[holdfast.Queue(name="members.count"), holdfast.Queue(name="members.welcome")],
    bindings=[
        holdfast.Binding(exchange="members", queue="members.count", routing_key="member.joined"),
        holdfast.Binding(exchange="members", queue="members.welcome", routing_key="member.#"),
    ],
)


async def join(bus: holdfast.Messaging, database: holdfast.Database, email: str) -> None:
    async with database.transaction() as tx:
        await tx.execute(text("INSERT INTO member (email) VALUES (:email)"), {"email": email})
        await bus.outbox.add(tx, "members", "member.joined", Joined(email))


async def count(tx: holdfast.Tx, joined: Joined) -> None:
    await tx.execute(text("UPDATE statistics SET members = members + 1"))


class Mailer:
    """A mail server that is away when it is first called."""

    def __init__(self) -> None:
        self.calls = 0

    async def send(self, email: str) -> None:
        self.calls += 1
        if self.calls == 1:
            raise ConnectionError("the mail server is away")
        if "@" not in email:
            raise holdfast.Reject(f"{email!r} is no address")


async def welcome(joined: Joined, mailer: Mailer) -> None:
    await mailer.send(joined.email)
    print("welcomed:", joined.email)


async def main(emails: list[str]) -> None:
    chosen = settings.load()
    observe.configure_logs(chosen.log.format, chosen.log.level)
    database = await holdfast.connect(chosen.database)
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with database.transaction() as tx:
        await tx.execute(text("CREATE TABLE IF NOT EXISTS member (email TEXT PRIMARY KEY)"))
        await tx.execute(text("CREATE TABLE IF NOT EXISTS statistics (members INTEGER)"))
        none_yet = "INSERT INTO statistics SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM statistics)"
        await tx.execute(text(none_yet))

    async with holdfast.open_messaging(database, TYPES, TOPOLOGY) as bus:
        bus.listen(holdfast.Listen(name="count", queue="members.count", handlers=[count]))
        bus.listen(
            holdfast.Listen(
                name="welcome",
                queue="members.welcome",
                handlers=[welcome],
                provide={Mailer: Mailer()},
                local=holdfast.RetryPolicy(tries=2, interval_ms=200),
                durable=holdfast.RetryPolicy(tries=10, interval_ms=5_000, multiplier=2.0),
            )
        )
        for email in emails:
            await join(bus, database, email)
        while (await bus.transport.stats("members.count")).total + (await bus.transport.stats("members.welcome")).total:
            await asyncio.sleep(0.05)

    async with database.read() as tx:
        print("members:", (await tx.execute(text("SELECT members FROM statistics"))).scalar_one())
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
