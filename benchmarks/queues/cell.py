"""One system measured once, in a process of its own: `python -m benchmarks.queues.cell SYSTEM URL`; prints JSON."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import make_url

from benchmarks.queues import on_postgres, on_sqlite, ours
from benchmarks.queues.load import Queue, Seen


class System(NamedTuple):
    """How to open it, and how many messages take it some seconds."""

    open: Callable[[Any], Awaitable[Queue]]
    singles: int
    batched: int
    peer: bool = True  # another library; False: ourselves, or the driver as the limit


def _at(kind: Callable[[Path], Any]) -> Callable[[Path], Awaitable[Queue]]:
    async def opened(folder: Path) -> Queue:
        queue: Queue = kind(folder)
        return queue

    return opened


def _alone(url: str) -> Awaitable[Queue]:
    """Group commit switched off: the same toolkit with a transaction for each message."""
    return ours.HoldfastEffects.open(url, batch_max=1)


SYSTEMS: dict[str, dict[str, System]] = {
    "sqlite": {
        "holdfast": System(ours.Holdfast.open, 20_000, 40_000, peer=False),
        "holdfast, prefetch 1,000": System(lambda url: ours.Holdfast.open(url, 1_000), 20_000, 40_000, peer=False),
        "huey (no ack)": System(_at(on_sqlite.Huey), 8_000, 0),
        "litequeue": System(_at(on_sqlite.Lite), 4_000, 0),
        "persist-queue": System(_at(on_sqlite.PersistQueue), 6_000, 0),
        "driver": System(_at(on_sqlite.Driver), 10_000, 90_000, peer=False),
        "holdfast, effects": System(ours.HoldfastEffects.open, 0, 40_000, peer=False),
        "holdfast, one effect a transaction": System(_alone, 0, 5_000, peer=False),
        "one transaction per effect": System(_at(on_sqlite.OneByOne), 0, 10_000, peer=False),
    },
    "postgresql": {
        "holdfast": System(ours.Holdfast.open, 20_000, 40_000, peer=False),
        "holdfast, prefetch 1,000": System(lambda url: ours.Holdfast.open(url, 1_000), 20_000, 40_000, peer=False),
        "pgqueuer": System(lambda url: on_postgres.PgQueuerQueue.open(url, 10), 6_000, 14_000),
        "pgqueuer, batch 100": System(lambda url: on_postgres.PgQueuerQueue.open(url, 100), 6_000, 34_000),
        "procrastinate": System(lambda url: on_postgres.Procrastinate.open(url, 10), 1_000, 1_000),
        "driver": System(on_postgres.Driver.open, 10_000, 90_000, peer=False),
        "holdfast, effects": System(ours.HoldfastEffects.open, 0, 40_000, peer=False),
        "holdfast, one effect a transaction": System(_alone, 0, 5_000, peer=False),
        "one transaction per effect": System(on_postgres.OneByOne.open, 0, 10_000, peer=False),
    },
}


def probe() -> float:
    """Seconds for a fixed piece of work: tells a slow moment of the machine from a slow system."""
    start = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number & 7
    return time.perf_counter() - start


def sync_probe() -> float:
    """Seconds, median of 50, to write 4 KiB and sync them: the least that a commit of its own costs on this disk."""
    took = []
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(50):
            start = time.perf_counter()
            os.write(file.fileno(), bytes(4_096))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - start)
    return statistics.median(took)


async def measure(system: System, where: Any) -> dict[str, float]:
    """Messages per second: put one a call, put in batches, and handled and settled."""
    figures = {"probe_s": probe(), "sync_s": sync_probe()}
    queue = await system.open(where)
    try:
        if system.singles:
            figures["put"] = system.singles / await _timed(queue.put_single(0, system.singles))
        if system.batched:
            figures["put_batch"] = system.batched / await _timed(queue.put_batches(system.singles, system.batched))
        count = system.singles + system.batched
        seen = Seen()
        figures["drain"] = count / await _timed(queue.drain(count, seen))
        seen.refuse_unless_all(count)
    finally:
        await queue.close()
    return figures


async def _timed(work: Awaitable[None]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


def main() -> None:
    """Measure the system that the command line names."""
    name, address = sys.argv[1:]
    url = make_url(address)
    system = SYSTEMS[url.get_backend_name()][name]
    where: Any = address
    if system.peer or name.startswith(("driver", "one transaction")):
        where = Path(url.database or "").parent if url.get_backend_name() == "sqlite" else address
    try:
        import uvloop  # noqa: PLC0415  # the same loop for all
    except ImportError:
        print(json.dumps(asyncio.run(measure(system, where))))
    else:
        print(json.dumps(uvloop.run(measure(system, where))))


if __name__ == "__main__":
    main()
