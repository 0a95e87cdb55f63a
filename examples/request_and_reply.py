"""Request and reply: ask over a queue, wait for the answer until a deadline.

Run it with `python examples/request_and_reply.py`: on a throw-away SQLite file, or on the postgresql:// URL that you
give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec

import holdfast
from holdfast import observe
from holdfast.errors import ReplyTimeout


class PriceWanted(msgspec.Struct, frozen=True):
    """What does it cost?"""

    sku: str


class Price(msgspec.Struct, frozen=True):
    """So much."""

    sku: str
    price_minor: int


TYPES = {"price.wanted": PriceWanted, "price": Price}
TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="prices")])


async def main(url: str) -> None:
    observe.configure_logs("console", "error")  # what is printed here is the story
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, TYPES, TOPOLOGY) as bus, bus.requester() as requests:

        async def answer(asked: holdfast.Incoming[PriceWanted]) -> None:
            await bus.reply(asked, Price(sku=asked.body.sku, price_minor=9_900))

        listener = bus.listen(holdfast.Listen(name="prices", queue="prices", handlers=[answer]))
        price = await requests.ask("", "prices", PriceWanted(sku="TICKET"), deadline_s=5)
        print(f"{price.sku} costs {price.price_minor}")

        listener.pause()
        try:
            await requests.ask("", "prices", PriceWanted(sku="LATE"), deadline_s=0.2)
        except ReplyTimeout as error:
            print("asked while nobody answers:", error.detail)
        listener.resume()  # nobody begins with the late one any more
        while (await bus.transport.stats("prices")).total:
            await asyncio.sleep(0.01)
        print("questions left:", (await bus.transport.stats("prices")).total)
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
