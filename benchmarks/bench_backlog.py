"""What a backlog costs: a million messages that are not due, a million that are, and messages nobody can handle.

*delayed*: publish 1,000,000 delayed messages, most of them due far in the future, some within the next half minute
while a worker listens. Publishing must not get slower as they pile up, the worker's memory must not grow with them, and
those that become due must be handled soon. *ready*: publish 1,000,000 with no consumer at all. *poison*: 200,000
messages of which every hundredth fails whenever it is handled, against the same without poison; exactly those must be
parked.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import uvloop
from sqlalchemy import text

from benchmarks.bench_messages import empty_database, versions
from benchmarks.queues.load import BATCH, TEXT, Note
from benchmarks.queues.ours import TOPOLOGY
from holdfast import (
    HISTORY,
    DatabaseSettings,
    Draft,
    Incoming,
    Listen,
    RetryPolicy,
    connect,
    migrate,
    observe,
    open_messaging,
)
from holdfast.clock import SystemClock
from holdfast.db.database import Database
from holdfast.messaging.toolkit import Messaging

CALLERS = 4
YEAR_MS = 365 * 86_400_000
SOON_MS = 30_000
CLAIM = """
SELECT id FROM hf_message WHERE queue = 'notes.queue' AND due_us <= :now
AND (expires_us IS NULL OR expires_us > :now) ORDER BY due_us, id LIMIT 200
"""
SOONEST = "SELECT min(due_us) FROM hf_message WHERE queue = 'notes.queue' AND due_us > :now"

clock = SystemClock()


class Due(msgspec.Struct, frozen=True):
    """A delayed message that says when it wants to be handled."""

    due_us: int


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4_096 / 1_048_576


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[tuple[Database, Messaging]]:
    database = await connect(DatabaseSettings(url=url))
    try:
        await migrate(database, [HISTORY])
        async with open_messaging(database, {"note": Note, "due": Due}, TOPOLOGY) as bus:
            yield database, bus
    finally:
        await database.close()


async def publish_all(bus: Messaging, batches: Iterator[list[Draft]]) -> None:
    """Publish batches by some callers at once."""

    async def caller() -> None:
        for batch in batches:
            if any(await bus.publisher.publish_all(batch)):
                raise RuntimeError("a message was not stored")

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


def draft(body: Note | Due, delay_ms: int = 0) -> Draft:
    return Draft(exchange="notes", routing_key="note", body=body, delay_ms=delay_ms)


async def pile_up(bus: Messaging, count: int, delays: random.Random | None) -> None:
    """Publish `count` messages and print the rate and the memory, a tenth at a time."""
    tenth = count // 10
    for part in range(10):

        def batches() -> Iterator[list[Draft]]:
            for start in range(0, tenth, BATCH):
                yield [
                    draft(Note(start + at, TEXT), 0 if delays is None else delays.randint(10 * SOON_MS, YEAR_MS))
                    for at in range(BATCH)
                ]

        start = time.perf_counter()
        await publish_all(bus, batches())
        rate = tenth / (time.perf_counter() - start)
        print(f"  {(part + 1) * tenth:>9,} waiting: published {rate:,.0f}/s, {resident_mib():.0f} MiB")


async def delayed(url: str, count: int) -> None:
    """A million pending; then 60,000 become due within half a minute."""
    async with opened(url) as (database, bus):
        await pile_up(bus, count, random.Random(1))
        await plans(database)
        late_ms: list[float] = []
        soon = 60_000

        async def handle(incoming: Incoming) -> None:
            late_ms.append((clock.now_us() - incoming.body.due_us) / 1_000)

        bus.listen(Listen(name="late", queue="notes.queue", plain={Due: handle}))
        before = resident_mib()

        def batches() -> Iterator[list[Draft]]:
            chance = random.Random(2)
            for _ in range(0, soon, BATCH):
                now_us = clock.now_us()
                delays = [chance.randint(SOON_MS // 3, SOON_MS) for _ in range(BATCH)]
                yield [draft(Due(now_us + delay * 1_000), delay) for delay in delays]

        start = time.perf_counter()
        await publish_all(bus, batches())
        print(f"  {soon:,} more, due soon, with a listener at work: {soon / (time.perf_counter() - start):,.0f}/s")
        while len(late_ms) < soon:
            await clock.sleep(1)
        late_ms.sort()
        print(
            f"  late: p50 {statistics.median(late_ms):.0f} ms, p99 {late_ms[soon * 99 // 100]:.0f} ms, "
            f"max {late_ms[-1]:.0f} ms, earliest {late_ms[0]:.1f} ms; N={soon:,}; "
            f"memory {before:.0f} -> {resident_mib():.0f} MiB"
        )


async def plans(database: Database) -> None:
    """How the database finds the messages that are due, and the next instant."""
    explain = "EXPLAIN" if database.dialect == "postgresql" else "EXPLAIN QUERY PLAN"
    async with database.transaction() as tx:
        if database.dialect == "postgresql":
            await tx.execute(text("ANALYZE hf_message"))
    async with database.read() as tx:
        for name, statement in (("claim", CLAIM), ("soonest", SOONEST)):
            found = (await tx.execute(text(f"{explain} {statement}"), {"now": clock.now_us()})).all()
            for row in found:
                print(f"  {name}: {row[-1]}")


async def ready(url: str, count: int) -> None:
    """A million with no consumer; afterwards all of them are handled."""
    async with opened(url) as (database, bus):
        await pile_up(bus, count, None)
        await plans(database)
        seen = 0
        done = asyncio.Event()

        async def handle(incoming: Incoming) -> None:
            nonlocal seen
            seen += 1
            if seen % (count // 10) == 0:
                print(f"  {seen:>9,} handled: {seen / (time.perf_counter() - start):,.0f}/s, {resident_mib():.0f} MiB")
            if seen == count:
                done.set()

        start = time.perf_counter()
        listener = bus.listen(Listen(name="all", queue="notes.queue", plain={Note: handle}))
        await done.wait()
        await listener.stop()
        stats = await bus.transport.stats("notes.queue")
        print(f"  left: {stats}")


async def poison(url: str, count: int) -> None:
    """The same messages without and with poison; every hundredth fails at each of its four tries."""
    rates = []
    for every in (0, 100):
        async with opened(url) as (database, bus):
            rates.append(await handled(database, bus, count, every))
    print(f"  throughput with 1 % poison: {rates[1] / rates[0]:.1%} of that without")


async def handled(database: Database, bus: Messaging, count: int, every: int) -> float:
    """Messages per second until the last good one is handled; poison may take its tries after that."""

    def batches() -> Iterator[list[Draft]]:
        for start in range(0, count, BATCH):
            yield [draft(Note(start + at, TEXT)) for at in range(BATCH)]

    await publish_all(bus, batches())
    good = calls = 0
    last_good = 0.0

    async def handle(incoming: Incoming) -> None:
        nonlocal good, calls, last_good
        calls += 1
        if every and incoming.body.number % every == 0:
            raise ValueError("poison")
        good += 1
        last_good = time.perf_counter()

    wanted = set(range(0, count, every)) if every else set()
    start = time.perf_counter()
    listener = bus.listen(
        Listen(
            name="poison",
            queue="notes.queue",
            plain={Note: handle},
            local=RetryPolicy(tries=2, interval_ms=100),
            durable=RetryPolicy(tries=2, interval_ms=500),
        )
    )
    while await _waiting(database):
        await clock.sleep(0.05)
    end = time.perf_counter()
    await listener.stop()
    async with database.transaction() as tx:
        bodies: Sequence[bytes] = (await tx.execute(text("SELECT body FROM hf_parked"))).scalars().all()
    parked = [msgspec.json.decode(body, type=Note).number for body in bodies]
    right = sorted(parked) == sorted(wanted) and good == count - len(wanted)
    print(
        f"  {count:,} messages, {len(wanted):,} of them poison: the others at {good / (last_good - start):,.0f}/s, all "
        f"settled {end - last_good:.1f} s later; {calls:,} calls, {len(parked):,} parked, "
        f"{'exactly those' if right else 'NOT THOSE'}"
    )
    return good / (last_good - start)


async def _waiting(database: Database) -> int:
    async with database.read() as tx:
        found = (await tx.execute(text("SELECT 1 FROM hf_message LIMIT 1"))).first()
    return found is not None


WHAT = {"delayed": (delayed, 1_000_000), "ready": (ready, 1_000_000), "poison": (poison, 200_000)}


def main() -> None:
    """Run what the command line names, on both databases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], default=list(WHAT))
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--count", type=int, help="messages, where fewer than usual are wanted")
    arguments = parser.parse_args()
    observe.configure_logs("json", "error")  # a line for every failure would measure the terminal
    print(versions())
    for database in [arguments.only] if arguments.only else ["sqlite", "postgresql"]:
        for name in arguments.what:
            run, count = WHAT[name]
            print(f"{database}, {name}:")
            with empty_database(database) as url:
                uvloop.run(run(url, arguments.count or count))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
