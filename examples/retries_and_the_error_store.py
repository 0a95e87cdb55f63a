"""Retries and the error store: tried again here, tried again later, kept for a human, mended and sent again.

Run it with `python examples/retries_and_the_error_store.py`: on a throw-away SQLite file, or on the postgresql:// URL
that you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec

import holdfast
from holdfast import observe


class Letter(msgspec.Struct, frozen=True):
    """Something to be sent by mail."""

    to: str


class Mailer:
    """A mail server: away for two calls, and strict about addresses."""

    def __init__(self) -> None:
        self.calls = 0
        self.sent: asyncio.Queue[str] = asyncio.Queue()

    async def send(self, to: str) -> None:
        self.calls += 1
        if self.calls <= 2:
            raise ConnectionError("the mail server is away")
        if "@" not in to:
            raise holdfast.Reject(f"{to!r} is no address")
        await self.sent.put(to)


async def post(letter: Letter, delivery: holdfast.Delivery, mailer: Mailer) -> None:
    try:
        await mailer.send(letter.to)
    except Exception as error:
        print(f"attempt {delivery.attempt}: {error}")
        raise
    print(f"attempt {delivery.attempt}: sent to {letter.to}")


TOPOLOGY = holdfast.Topology(queues=[holdfast.Queue(name="letters")])


async def main(url: str) -> None:
    observe.configure_logs("console", "error")  # what is printed here is the story
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, {"letter": Letter}, TOPOLOGY) as bus:
        mailer = Mailer()
        listen = holdfast.Listen(
            name="post",
            queue="letters",
            handlers=[post],
            provide={Mailer: mailer},
            local=holdfast.RetryPolicy(tries=2, interval_ms=50),  # here, while the message stays ours
            durable=holdfast.RetryPolicy(tries=5, interval_ms=100, multiplier=2.0),  # then later, by any process
        )
        bus.listen(listen)
        await bus.publisher.publish("", "letters", Letter(to="ann@example.org"))
        await asyncio.wait_for(mailer.sent.get(), 10)

        await bus.publisher.publish("", "letters", Letter(to="ben at example.org"))
        while not (parked := await bus.error_store.list()):
            await asyncio.sleep(0.01)
        (kept,) = parked
        print("kept:", kept.reason.splitlines()[0])
        await bus.error_store.edit(kept.id, actor="ann", body=b'{"to":"ben@example.org"}', reason="a typing error")
        await bus.error_store.replay([kept.id], actor="ann")
        print("after the edit:", await asyncio.wait_for(mailer.sent.get(), 10))
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
