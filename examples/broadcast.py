"""Broadcast: every instance gets every message by a queue of its own; a shared queue gives it to one of them.

Two listeners stand for two instances here. Run it with `python examples/broadcast.py`: on a throw-away SQLite file, or
on the postgresql:// URL that you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec

import holdfast
from holdfast import observe


class PricesChanged(msgspec.Struct, frozen=True):
    """Forget the prices you remember."""

    sku: str


EXCHANGE = holdfast.Exchange(name="prices", kind="fanout")
WORKERS = holdfast.Queue(name="prices.report")
SHARED = holdfast.Topology(
    exchanges=[EXCHANGE], queues=[WORKERS], bindings=[holdfast.Binding(exchange="prices", queue=WORKERS.name)]
)


async def instance(bus: holdfast.Messaging, name: str, seen: asyncio.Queue[str]) -> None:
    async def forget(changed: PricesChanged) -> None:
        await seen.put(f"{name} forgets {changed.sku}")

    async def report(changed: PricesChanged) -> None:
        await seen.put(f"one of them reports {changed.sku}")

    own = holdfast.Queue.anonymous("prices.cache")  # gone with this instance
    binding = holdfast.Binding(exchange=EXCHANGE.name, queue=own.name)
    await bus.transport.declare(holdfast.Topology(exchanges=[EXCHANGE], queues=[own], bindings=[binding]))
    bus.listen(holdfast.Listen(name=f"forget-{name}", queue=own.name, handlers=[forget]))
    bus.listen(holdfast.Listen(name="report", queue=WORKERS.name, handlers=[report]))


async def main(url: str) -> None:
    observe.configure_logs("console", "error")  # what is printed here is the story
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, {"prices.changed": PricesChanged}, SHARED) as bus:
        seen: asyncio.Queue[str] = asyncio.Queue()
        await instance(bus, "instance 1", seen)
        await instance(bus, "instance 2", seen)
        await bus.publisher.publish("prices", "", PricesChanged(sku="TICKET"))
        for line in sorted([await asyncio.wait_for(seen.get(), 10) for _ in range(3)]):
            print(line)
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
