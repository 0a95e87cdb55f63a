"""A queue that nobody consumes: publishers are not held up, the process does not grow, and later all of it arrives."""

# ruff: noqa: N802  # the row keeps its name

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from holdfast import (
    HISTORY,
    Binding,
    DatabaseSettings,
    Draft,
    Exchange,
    Listen,
    Messaging,
    Queue,
    Topology,
    connect,
    migrate,
    open_messaging,
)
from tests.conftest import eventually

pytestmark = pytest.mark.torture

COUNT = 1_000_000 if os.environ.get("TORTURE") == "full" else 20_000
BATCH = 200
GROWTH_MIB_MAX = 32  # of the whole process, whatever COUNT is: a million small messages kept would be ten times that
WAIT_S = 600
TOPOLOGY = Topology(
    exchanges=[Exchange(name="notes")],
    queues=[Queue(name="notes.queue")],
    bindings=[Binding(exchange="notes", queue="notes.queue", routing_key="note")],
)


class Note(msgspec.Struct, frozen=True):
    """A small message."""

    number: int


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Messaging]:
    database = await connect(DatabaseSettings(url=url))
    try:
        await migrate(database, [HISTORY])
        async with open_messaging(database, {"note": Note}, TOPOLOGY) as bus:
            yield bus
    finally:
        await database.close()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def publish(bus: Messaging, first: int, count: int) -> None:
    for start in range(first, first + count, BATCH):
        notes = [Note(number) for number in range(start, start + BATCH)]
        drafts = [Draft(exchange="notes", routing_key="note", body=note) for note in notes]
        assert await bus.publisher.publish_all(drafts) == [None] * BATCH


async def check_backlog(url: str) -> None:
    async with opened(url) as bus:
        tenth = COUNT // 10
        await publish(bus, 0, tenth)  # caches and pools have their size after this
        before = resident_mib()
        await publish(bus, tenth, COUNT - tenth)
        assert (await bus.transport.stats("notes.queue")).ready == COUNT
        assert resident_mib() - before < GROWTH_MIB_MAX
    # Another process could consume it as well; a new toolkit knows as little of it.
    async with opened(url) as bus:
        seen = bytearray(COUNT)

        async def handle(note: Note) -> None:
            seen[note.number] += 1

        bus.listen(Listen(name="clerk", queue="notes.queue", handlers=[handle]))

        async def all_gone() -> bool:
            stats = await bus.transport.stats("notes.queue")
            return stats.ready == stats.unacked == stats.delayed == 0

        await eventually(all_gone, "the backlog is handled", wait_s=WAIT_S)
        assert set(seen) == {1}


async def test_H10_backlog_on_sqlite(tmp_path: Path) -> None:
    await check_backlog(f"sqlite:///{tmp_path}/backlog.db")


async def test_H10_backlog_on_postgresql(postgres_url: str) -> None:
    await check_backlog(postgres_url)
