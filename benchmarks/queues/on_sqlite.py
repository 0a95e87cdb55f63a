"""Peers on SQLite, each with `synchronous=FULL`: what is acknowledged survives a power cut, as with holdfast."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path
from typing import Any, cast

import msgspec
from huey import SqliteHuey
from litequeue import LiteQueue
from persistqueue import SQLiteAckQueue
from persistqueue.serializers import json as json_serializer

from benchmarks.queues.load import BATCH, TEXT, Note, Seen

_encode = msgspec.json.encode
_decode = msgspec.json.Decoder(Note).decode


class _OneCaller:
    """These libraries are blocking, and SQLite has one writer: one caller is as fast as any number of threads."""

    def put(self, number: int) -> None:
        raise NotImplementedError

    async def put_single(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self.put(number)

    async def put_batches(self, first: int, count: int) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass


class Huey(_OneCaller):
    """Its worker's own calls in one thread. It has no ack: a message is gone before its task begins."""

    def __init__(self, folder: Path) -> None:
        self._huey = SqliteHuey("bench", filename=str(folder / "huey.db"), fsync=True, results=False)
        self._seen = Seen()

        @self._huey.task()  # type: ignore[untyped-decorator]
        def note(number: int, text: str) -> None:
            self._seen.note(number)

        self._note = note

    def put(self, number: int) -> None:
        self._note(number, TEXT)

    async def drain(self, count: int, seen: Seen) -> None:
        self._seen = seen
        for _ in range(count):
            task = self._huey.dequeue()
            self._huey.execute(task)


class Lite(_OneCaller):
    """litequeue: pop, handle, done."""

    def __init__(self, folder: Path) -> None:
        self._queue: Any = LiteQueue(str(folder / "lite.db"))
        self._queue.conn.execute("PRAGMA synchronous = FULL")  # it sets NORMAL by itself

    def put(self, number: int) -> None:
        self._queue.put(_encode(Note(number, TEXT)).decode())

    async def drain(self, count: int, seen: Seen) -> None:
        for _ in range(count):
            message = self._queue.pop()
            assert message is not None
            seen.note(_decode(message.data).number)
            self._queue.done(message.message_id)


class PersistQueue(_OneCaller):
    """persist-queue's SQLiteAckQueue: get, handle, ack."""

    def __init__(self, folder: Path) -> None:
        self._queue = cast(Any, SQLiteAckQueue(str(folder), serializer=json_serializer, auto_commit=True))
        (level,) = self._queue._putter.execute("PRAGMA synchronous").fetchone()
        assert level == 2, "FULL is SQLite's default"

    def put(self, number: int) -> None:
        self._queue.put({"number": number, "text": TEXT})

    async def drain(self, count: int, seen: Seen) -> None:
        for _ in range(count):
            item = self._queue.get(block=False, raw=True)
            seen.note(item["data"]["number"])
            self._queue.ack(id=item["pqid"])


class Driver:
    """The limit: sqlite3 itself, a minimal table, `BATCH` messages in a transaction; no routing, no types, no retry."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "raw.db", isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE message (id INTEGER PRIMARY KEY, lease INTEGER, body BLOB NOT NULL)")
        self._db.execute("CREATE INDEX ready ON message (id) WHERE lease IS NULL")

    async def put_single(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self._db.execute("INSERT INTO message (body) VALUES (?)", (_encode(Note(number, TEXT)),))

    async def put_batches(self, first: int, count: int) -> None:
        for start in range(first, first + count, BATCH):
            rows = [(_encode(Note(number, TEXT)),) for number in range(start, start + BATCH)]
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO message (body) VALUES (?)", rows)
            self._db.execute("COMMIT")

    async def drain(self, count: int, seen: Seen) -> None:
        claim = (
            "UPDATE message SET lease = 1 WHERE id IN (SELECT id FROM message WHERE lease IS NULL ORDER BY id LIMIT ?) "
            "RETURNING id, body"
        )
        while rows := self._db.execute(claim, (BATCH,)).fetchall():
            for _, body in rows:
                seen.note(_decode(body).number)
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM message WHERE id = ?", [(row_id,) for row_id, _ in rows])
            self._db.execute("COMMIT")

    async def close(self) -> None:
        self._db.close()


class OneByOne(Driver):
    """What most people write: for each message one transaction with inbox row, business row and its removal."""

    async def drain(self, count: int, seen: Seen) -> None:
        self._db.execute("CREATE TABLE inbox (message_id INTEGER PRIMARY KEY)")
        self._db.execute("CREATE TABLE noted (number INTEGER PRIMARY KEY)")
        while True:
            self._db.execute("BEGIN IMMEDIATE")
            row = self._db.execute("SELECT id, body FROM message ORDER BY id LIMIT 1").fetchone()
            if row is None:
                self._db.execute("COMMIT")
                return
            note = _decode(row[1])
            self._db.execute("INSERT INTO inbox VALUES (?)", (row[0],))
            self._db.execute("INSERT INTO noted VALUES (?)", (note.number,))
            self._db.execute("DELETE FROM message WHERE id = ?", (row[0],))
            self._db.execute("COMMIT")
            seen.note(note.number)


warnings.filterwarnings("ignore", module="persistqueue")
