"""Coming from Celery: tasks with retries, a countdown, a chain and a beat, as messages. See docs/from-celery.md.

Run it with `python examples/coming_from_celery.py`: in memory, on a clock that is moved by hand, so three days take
milliseconds.
"""

from __future__ import annotations

import asyncio

import msgspec
from sqlalchemy import text

import holdfast
from holdfast import observe
from holdfast.messaging import testing

# -- the program ------------------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True):
    email: str


class Remind(msgspec.Struct, frozen=True):
    email: str


class Digest(msgspec.Struct, frozen=True):
    day: int


TYPES = {"welcome": Welcome, "remind": Remind, "digest": Digest}
TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="mails"), holdfast.Queue(name="digests")])
DAY_MS = 86_400_000


class Mailer:
    """Your client of a mail server; a blocking one."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, email: str, line: str) -> None:
        self.sent.append(f"{email}: {line}")


async def sign_up(bus: holdfast.Messaging, tx: holdfast.Tx, email: str) -> None:
    await tx.execute(text("INSERT INTO member (email, confirmed) VALUES (:email, 0)"), {"email": email})
    await bus.outbox.add(tx, "", "mails", Welcome(email))
    await bus.outbox.add(tx, "", "mails", Remind(email), delay_ms=3 * DAY_MS, cancel_key=f"remind:{email}")


async def confirm(bus: holdfast.Messaging, tx: holdfast.Tx, email: str) -> None:
    await tx.execute(text("UPDATE member SET confirmed = 1 WHERE email = :email"), {"email": email})
    await bus.outbox.cancel(tx, f"remind:{email}")


async def welcome(wanted: Welcome, mailer: Mailer) -> None:
    await asyncio.to_thread(mailer.send, wanted.email, "welcome")


async def remind(wanted: Remind, mailer: Mailer) -> None:
    await asyncio.to_thread(mailer.send, wanted.email, "please confirm")


def mails(mailer: Mailer) -> holdfast.Listen:
    return holdfast.Listen(
        name="mails",
        queue="mails",
        handlers=[welcome, remind],
        provide={Mailer: mailer},
        durable=holdfast.RetryPolicy(tries=10, interval_ms=5_000, multiplier=2.0, interval_ms_max=600_000),
    )


def digests(bus: holdfast.Messaging) -> holdfast.Listen:
    async def digest(tx: holdfast.Tx, today: Digest) -> None:
        await tx.execute(text("INSERT INTO digest (day) VALUES (:day)"), {"day": today.day})
        await bus.outbox.add(tx, "", "digests", Digest(today.day + 1), delay_ms=DAY_MS, cancel_key="digest")

    return holdfast.Listen(name="digests", queue="digests", handlers=[digest])


# -- its test ---------------------------------------------------------------------------------------------------------


async def test_members_are_welcomed_and_reminded() -> None:
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        mailer = Mailer()
        async with bus.database.transaction() as tx:
            await tx.execute(text("CREATE TABLE member (email TEXT, confirmed INTEGER)"))
            await sign_up(bus, tx, "ann@example.org")
            await sign_up(bus, tx, "ben@example.org")
        bus.faults.fail("mails", times=3, error=ConnectionError("the mail server is away"))
        bus.listen(mails(mailer))
        await bus.advance(60)
        await bus.drained()
        assert sorted(mailer.sent) == ["ann@example.org: welcome", "ben@example.org: welcome"]

        async with bus.database.transaction() as tx:
            await confirm(bus, tx, "ann@example.org")
        await bus.advance(3 * 86_400)
        await bus.drained()
        assert mailer.sent[2:] == ["ben@example.org: please confirm"]
        print("three days later:", mailer.sent[2])


async def test_a_digest_a_day() -> None:
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        async with bus.database.transaction() as tx:
            await tx.execute(text("CREATE TABLE digest (day INTEGER)"))
            await bus.outbox.add(tx, "", "digests", Digest(1), cancel_key="digest")
        bus.faults.duplicate("digests")
        bus.listen(digests(bus))
        await bus.advance(6 * 86_400)
        async with bus.database.read() as tx:
            days = list((await tx.execute(text("SELECT day FROM digest ORDER BY day"))).scalars())
        assert days == [1, 2, 3, 4, 5, 6, 7]
        print("digests of a week:", days)


async def main() -> None:
    observe.configure_logs("console", "error")  # what is printed here is the story
    await test_members_are_welcomed_and_reminded()
    await test_a_digest_a_day()


if __name__ == "__main__":
    asyncio.run(main())
