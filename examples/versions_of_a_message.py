"""Versions of a message: what yesterday's program wrote is brought to today's version before today's handler sees it.

Run it with `python examples/versions_of_a_message.py`: on a throw-away SQLite file, or on the postgresql:// URL that
you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import msgspec

import holdfast


@dataclass(frozen=True)
class WelcomeV1:
    """Yesterday: one field."""

    mail: str


class Welcome(msgspec.Struct, frozen=True):
    """Today: another name for it, and a language."""

    email: str
    language: str


def welcome_v2(old: dict[str, Any]) -> dict[str, Any]:
    return {"email": old["mail"], "language": "en"}


TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="welcome.queue")])

YESTERDAY = holdfast.Codec({"welcome.v1": WelcomeV1})
TODAY = holdfast.Codec(
    {"welcome.v2": Welcome},
    upcasters={"welcome.v1": ("welcome.v2", welcome_v2)},
    java={"org.example.mall.WelcomeTo": Welcome},  # as a Spring service calls it, out and in
    compress="gzip",  # bodies over 1 KiB
)


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])

    async with holdfast.open_messaging(database, YESTERDAY, TOPOLOGY) as bus:
        await bus.publisher.publish("", "welcome.queue", WelcomeV1(mail="ann@example.org"))

    async with holdfast.open_messaging(database, TODAY, TOPOLOGY) as bus:
        await bus.publisher.publish("", "welcome.queue", Welcome(email="bob@example.org", language="fr"))
        got: asyncio.Queue[tuple[str, Welcome]] = asyncio.Queue()

        async def welcome(incoming: holdfast.Incoming) -> None:
            await got.put((incoming.delivery.message.type, incoming.body))

        bus.listen(holdfast.Listen(name="welcome", queue="welcome.queue", plain={Welcome: welcome}))
        for _ in range(2):
            came_as, body = await asyncio.wait_for(got.get(), 10)
            print(f"welcomed: {body.email} in {body.language!r}, sent as {came_as}")
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
