"""Peers on PostgreSQL, with its default durability."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import msgspec
import procrastinate
from pgqueuer import AsyncpgPoolDriver, PgQueuer, Queries
from pgqueuer.types import QueueExecutionMode

from benchmarks.queues.load import BATCH, TEXT, Note, Seen

CALLERS = 10
_encode = msgspec.json.encode
_decode = msgspec.json.Decoder(Note).decode


async def _pool(url: str) -> Any:
    return await asyncpg.create_pool(url, min_size=CALLERS, max_size=CALLERS)


async def _by_callers(count: int, callers: int, call: Any) -> None:
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await call(number)

    await asyncio.gather(*(caller() for _ in range(callers)))


class PgQueuerQueue:
    """pgqueuer: enqueue, and its worker until the queue is empty, with the batch size given."""

    def __init__(self, pool: Any, batch_size: int) -> None:
        self._pool = pool
        self._batch_size = batch_size
        self._queries = Queries(AsyncpgPoolDriver(pool))

    @classmethod
    async def open(cls, url: str, batch_size: int) -> PgQueuerQueue:
        queue = cls(await _pool(url), batch_size)
        await queue._queries.install()
        return queue

    async def put_single(self, first: int, count: int) -> None:
        async def call(number: int) -> None:
            await self._queries.enqueue("note", _encode(Note(first + number, TEXT)))

        await _by_callers(count, CALLERS, call)

    async def put_batches(self, first: int, count: int) -> None:
        async def call(number: int) -> None:
            start = first + number * BATCH
            bodies: list[bytes | None] = [_encode(Note(each, TEXT)) for each in range(start, start + BATCH)]
            await self._queries.enqueue(["note"] * BATCH, bodies, [0] * BATCH)

        await _by_callers(count // BATCH, 4, call)

    async def drain(self, count: int, seen: Seen) -> None:
        worker = PgQueuer(AsyncpgPoolDriver(self._pool))

        @worker.entrypoint("note")
        async def note(job: Any) -> None:
            seen.note(_decode(job.payload).number)

        await worker.run(batch_size=self._batch_size, mode=QueueExecutionMode.drain)

    async def close(self) -> None:
        await self._pool.close()


class Procrastinate:
    """procrastinate: defer, and its worker until the queue is empty, with as many jobs at once as suit it."""

    def __init__(self, app: procrastinate.App, concurrency: int) -> None:
        self._app = app
        self._concurrency = concurrency
        self._seen = Seen()

        @app.task(name="note", queue="notes")
        async def note(number: int, text: str) -> None:
            self._seen.note(number)

        self._note = note

    @classmethod
    async def open(cls, url: str, concurrency: int) -> Procrastinate:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, max_size=CALLERS))
        await app.open_async()
        await app.schema_manager.apply_schema_async()
        return cls(app, concurrency)

    async def put_single(self, first: int, count: int) -> None:
        async def call(number: int) -> None:
            await self._note.defer_async(number=first + number, text=TEXT)

        await _by_callers(count, CALLERS, call)

    async def put_batches(self, first: int, count: int) -> None:
        async def call(number: int) -> None:
            start = first + number * BATCH
            arguments: list[Any] = [{"number": each, "text": TEXT} for each in range(start, start + BATCH)]
            await self._note.batch_defer_async(*arguments)

        await _by_callers(count // BATCH, 4, call)

    async def drain(self, count: int, seen: Seen) -> None:
        self._seen = seen
        await self._app.run_worker_async(
            wait=False, concurrency=self._concurrency, listen_notify=False, install_signal_handlers=False
        )

    async def close(self) -> None:
        await self._app.close_async()


class Driver:
    """The limit: asyncpg itself, a minimal table, `BATCH` messages in a statement; no routing, no types, no retry."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @classmethod
    async def open(cls, url: str) -> Driver:
        pool = await _pool(url)
        await pool.execute("CREATE TABLE message (id BIGSERIAL PRIMARY KEY, lease BIGINT, body BYTEA NOT NULL)")
        await pool.execute("CREATE INDEX ready ON message (id) WHERE lease IS NULL")
        return cls(pool)

    async def put_single(self, first: int, count: int) -> None:
        async def call(number: int) -> None:
            await self._pool.execute("INSERT INTO message (body) VALUES ($1)", _encode(Note(first + number, TEXT)))

        await _by_callers(count, CALLERS, call)

    async def put_batches(self, first: int, count: int) -> None:
        async def call(number: int) -> None:
            start = first + number * BATCH
            bodies = [_encode(Note(each, TEXT)) for each in range(start, start + BATCH)]
            await self._pool.execute("INSERT INTO message (body) SELECT unnest($1::bytea[])", bodies)

        await _by_callers(count // BATCH, 4, call)

    async def drain(self, count: int, seen: Seen) -> None:
        claim = (
            "UPDATE message SET lease = 1 WHERE id IN "
            "(SELECT id FROM message WHERE lease IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED) "
            "RETURNING id, body"
        )
        while rows := await self._pool.fetch(claim, BATCH):
            for row in rows:
                seen.note(_decode(row["body"]).number)
            await self._pool.execute("DELETE FROM message WHERE id = ANY($1)", [row["id"] for row in rows])

    async def close(self) -> None:
        await self._pool.close()


class OneByOne(Driver):
    """What most people write: for each message one transaction with inbox row, business row and the message's removal.

    `CALLERS` workers at once, each on a connection of its own.
    """

    async def drain(self, count: int, seen: Seen) -> None:
        await self._pool.execute("CREATE TABLE inbox (message_id BIGINT PRIMARY KEY)")
        await self._pool.execute("CREATE TABLE noted (number BIGINT PRIMARY KEY)")
        claim = "SELECT id, body FROM message ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"

        async def worker() -> None:
            async with self._pool.acquire() as connection:
                while True:
                    async with connection.transaction():
                        row = await connection.fetchrow(claim)
                        if row is None:
                            return
                        note = _decode(row["body"])
                        await connection.execute("INSERT INTO inbox VALUES ($1)", row["id"])
                        await connection.execute("INSERT INTO noted VALUES ($1)", note.number)
                        await connection.execute("DELETE FROM message WHERE id = $1", row["id"])
                    seen.note(note.number)

        await asyncio.gather(*(worker() for _ in range(CALLERS)))
