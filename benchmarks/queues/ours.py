"""holdfast under the load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Self

import msgspec
from sqlalchemy import BigInteger, Column, MetaData, Table, insert, text

from benchmarks.queues.load import BATCH, TEXT, Note, Seen
from holdfast import (
    HISTORY,
    Binding,
    DatabaseSettings,
    Draft,
    Exchange,
    Incoming,
    Listen,
    Queue,
    Topology,
    Tx,
    connect,
    migrate,
    open_messaging,
)
from holdfast.db.database import Database
from holdfast.messaging.toolkit import Messaging

CALLERS = 100
noted = Table("noted", MetaData(), Column("number", BigInteger, primary_key=True))
TOPOLOGY = Topology(
    exchanges=[Exchange(name="notes")],
    queues=[Queue(name="notes.queue")],
    bindings=[Binding(exchange="notes", queue="notes.queue", routing_key="note")],
)


class Holdfast:
    """Typed bodies, confirmed publishing, a handler for each message; the listener's settings are given."""

    def __init__(self, stack: AsyncExitStack, database: Database, bus: Messaging, prefetch: int | None) -> None:
        self._stack = stack
        self._database = database
        self._bus = bus
        self._prefetch = prefetch

    @classmethod
    async def open(cls, url: str, prefetch: int | None = None, batch_max: int | None = None) -> Self:
        stack = AsyncExitStack()
        database = await connect(DatabaseSettings(url=url))
        stack.push_async_callback(database.close)
        await migrate(database, [HISTORY])
        limits = DatabaseSettings(url=url) if batch_max is None else DatabaseSettings(url=url, batch_max=batch_max)
        opening = open_messaging(database, {"note": Note}, TOPOLOGY, database_settings=limits)
        bus = await stack.enter_async_context(opening)
        return cls(stack, database, bus, prefetch)

    async def put_single(self, first: int, count: int) -> None:
        numbers = iter(range(first, first + count))

        async def caller() -> None:
            for number in numbers:
                await self._bus.publisher.publish("notes", "note", Note(number, TEXT))

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async def put_batches(self, first: int, count: int) -> None:
        starts = iter(range(first, first + count, BATCH))

        async def caller() -> None:
            for start in starts:
                drafts = [
                    Draft(exchange="notes", routing_key="note", body=Note(number, TEXT))
                    for number in range(start, start + BATCH)
                ]
                if any(await self._bus.publisher.publish_all(drafts)):
                    raise RuntimeError("a message was not stored")

        await asyncio.gather(*(caller() for _ in range(4)))

    async def drain(self, count: int, seen: Seen) -> None:
        done = asyncio.Event()

        async def handle(incoming: Incoming) -> None:
            seen.note(incoming.body.number)
            if seen.count == count:
                done.set()

        await self._listen(Listen(name="bench", queue="notes.queue", plain={Note: handle}), done)

    async def _listen(self, listen: Listen, done: asyncio.Event) -> None:
        if self._prefetch is not None:
            listen = msgspec.structs.replace(listen, prefetch=self._prefetch)
        listener = self._bus.listen(listen)
        await done.wait()
        await listener.stop()  # returns when all is settled
        left = await self._bus.transport.stats("notes.queue")
        if left.ready or left.unacked:
            raise RuntimeError(f"not settled: {left}")

    async def close(self) -> None:
        await self._stack.aclose()


class HoldfastEffects(Holdfast):
    """The same with an effect: inbox row, one business row and the ack commit together."""

    async def drain(self, count: int, seen: Seen) -> None:
        done = asyncio.Event()
        async with self._database.transaction() as tx:
            await tx.execute(text("CREATE TABLE noted (number BIGINT PRIMARY KEY)"))

        async def effect(tx: Tx, notes: Sequence[Note]) -> None:
            await tx.execute(insert(noted), [{"number": note.number} for note in notes])
            tx.on_commit(lambda: committed(notes))

        def committed(notes: Sequence[Note]) -> None:
            for note in notes:
                seen.note(note.number)
            if seen.count == count:
                done.set()

        await self._listen(Listen(name="bench", queue="notes.queue", effects={Note: effect}), done)
