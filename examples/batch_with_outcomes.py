"""Batches: many messages in one call, and an outcome for each: one fails, its neighbours are done.

Run it with `python examples/batch_with_outcomes.py`: on a throw-away SQLite file, or on the postgresql:// URL that you
give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence

import msgspec

import holdfast
from holdfast import observe


class Product(msgspec.Struct, frozen=True):
    """A product to be put into the search index."""

    sku: str
    price_minor: int


TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="index")])


async def index(products: Sequence[Product]) -> Sequence[Exception | None]:
    """One request to the search engine for all of them, and what it said of each."""
    print(f"one call for {len(products)} products")
    return [None if each.price_minor > 0 else holdfast.Reject(f"{each.sku} has no price") for each in products]


async def main(url: str) -> None:
    observe.configure_logs("console", "error")  # what is printed here is the story
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, {"product": Product}, TOPOLOGY) as bus:
        products = [Product(sku=f"sku-{number}", price_minor=0 if number == 7 else 100) for number in range(10)]
        drafts = [holdfast.Draft(exchange="", routing_key="index", body=each) for each in products]
        print("sent:", sum(problem is None for problem in await bus.publisher.publish_all(drafts)))

        bus.listen(holdfast.Listen(name="index", queue="index", handlers=[index], batch_max=50))
        while (await bus.transport.stats("index")).total:
            await asyncio.sleep(0.01)
        for kept in await bus.error_store.list():
            print("kept for a human:", kept.reason.splitlines()[0])
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
