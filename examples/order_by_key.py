"""Order by key: messages of one order are handled one after the other, those of different orders side by side.

Run it with `python examples/order_by_key.py`: on a throw-away SQLite file, or on the postgresql:// URL that you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec

import holdfast


class Step(msgspec.Struct, frozen=True):
    """A step of an order."""

    order: str
    name: str


TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="steps")])
STEPS = [Step(order=order, name=name) for name in ("placed", "paid", "sent") for order in ("A", "B", "C")]


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, {"step": Step}, TOPOLOGY) as bus:
        drafts = [holdfast.Draft(exchange="", routing_key="steps", body=step) for step in STEPS]
        await bus.publisher.publish_all(drafts)
        done: dict[str, list[str]] = {}
        at_work: set[str] = set()
        side_by_side = 0

        async def handle(step: Step) -> None:
            nonlocal side_by_side
            assert step.order not in at_work, "two steps of one order at once"
            at_work.add(step.order)
            side_by_side = max(side_by_side, len(at_work))
            await asyncio.sleep(0.05 if step.name == "placed" else 0.01)  # the first step is the slowest
            at_work.remove(step.order)
            done.setdefault(step.order, []).append(step.name)

        bus.listen(holdfast.Listen(name="steps", queue="steps", handlers=[handle], key=lambda step: step.order))
        while (await bus.transport.stats("steps")).total:
            await asyncio.sleep(0.01)
        for order, names in sorted(done.items()):
            print(f"order {order}:", ", ".join(names))
        print("orders at work at once:", side_by_side)
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
