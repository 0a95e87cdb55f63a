"""Test your handlers without a server and without waiting: `holdfast.messaging.testing`.

Run it with `python examples/testing_your_handlers.py`, or with pytest and pytest-asyncio (`asyncio_mode = "auto"`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from sqlalchemy import text

import holdfast
from holdfast.messaging import testing

# -- the code under test ----------------------------------------------------------------------------------------------


class WelcomeWanted(msgspec.Struct, frozen=True):
    """Somebody signed up and should be welcomed."""

    email: str


TYPES = {"welcome.wanted": WelcomeWanted}
TOPOLOGY = holdfast.Topology(
    exchanges=[holdfast.Exchange(name="members", kind="topic")],
    queues=[holdfast.Queue(name="welcome.queue")],
    bindings=[holdfast.Binding(exchange="members", queue="welcome.queue", routing_key="member.#")],
)

WEEK_S = 7 * 86_400


async def sign_up(bus: holdfast.Messaging, tx: holdfast.Tx, email: str) -> None:
    """Ask for a welcome a week from now."""
    await bus.outbox.add(tx, "members", "member.joined", WelcomeWanted(email), delay_ms=WEEK_S * 1_000)


async def welcome(tx: holdfast.Tx, wanted: Sequence[WelcomeWanted]) -> None:
    """Write down who was welcomed."""
    await tx.execute(text("INSERT INTO welcomed (email) VALUES (:email)"), [{"email": each.email} for each in wanted])


WELCOME = holdfast.Listen(name="welcome", queue="welcome.queue", effects={WelcomeWanted: welcome})

# -- its tests --------------------------------------------------------------------------------------------------------


async def welcomed(bus: testing.Bus) -> list[str]:
    async with bus.database.read() as tx:
        return list((await tx.execute(text("SELECT email FROM welcomed ORDER BY email"))).scalars())


async def signed_up(bus: testing.Bus, *emails: str) -> None:
    """A database with the table, a listener at work, and members who wait for their welcome."""
    async with bus.database.transaction() as tx:
        await tx.execute(text("CREATE TABLE welcomed (email TEXT)"))
        for email in emails:
            await sign_up(bus, tx, email)
    bus.listen(WELCOME)


async def test_the_welcome_comes_after_a_week() -> None:
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        await signed_up(bus, "ann@example.org")
        assert bus.published == [("members", "member.joined", WelcomeWanted("ann@example.org"))]
        await bus.advance(WEEK_S - 1)
        assert await welcomed(bus) == []
        await bus.advance(1)
        assert await welcomed(bus) == ["ann@example.org"]
        await bus.drained()
        print("welcomed:", ", ".join(await welcomed(bus)))


async def test_a_message_that_comes_twice_welcomes_once() -> None:
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        bus.faults.duplicate("welcome.queue")
        await signed_up(bus, "ben@example.org")
        await bus.advance(WEEK_S)
        await bus.drained()
        assert await welcomed(bus) == ["ben@example.org"]
        assert bus.faults.left == {}


async def test_what_fails_for_long_is_tried_again_and_then_kept_for_a_human() -> None:
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        bus.faults.fail("welcome.queue", times=30, error=ConnectionError("the mail server is away"))
        await signed_up(bus, "cleo@example.org")
        await bus.advance(WEEK_S + 86_400)
        (kept,) = await bus.parked("welcome.queue")
        assert kept.reason.startswith("ConnectionError: the mail server is away")
        assert kept.attempt == 10

        await bus.error_store.replay([kept.id], actor="ops", reason="the mail server is back")
        await bus.drained()
        assert await welcomed(bus) == ["cleo@example.org"]


async def main() -> None:
    await test_the_welcome_comes_after_a_week()
    await test_a_message_that_comes_twice_welcomes_once()
    await test_what_fails_for_long_is_tried_again_and_then_kept_for_a_human()


if __name__ == "__main__":
    asyncio.run(main())
