"""QueueGauges: how full the queues of the database are, as Prometheus gauges.

The numbers are the database's, so every process that exports them tells the same: take the maximum over instances in a
query, not the sum. Prometheus collects without waiting and our databases are asked with `await`, so ordinary gauges are
set before a scrape instead of a collector that counts during it.
"""

from __future__ import annotations

import asyncio

from holdfast import observe
from holdfast.clock import US_PER_S, Clock
from holdfast.db.database import Database
from holdfast.messaging.transports.sql import insight

STATES = ("ready", "unacked", "delayed", "parked")
EVERY_S = 5.0  # the queues are counted at most so often, however many ask
WAIT_S = 1.0  # so long a scrape waits for the count; it goes on afterwards, for the next one
KEPT_S = 60.0  # a count older than this is told no more: better no number than an old one

log = observe.logger("queue_gauges")


class QueueGauges:
    """Counts the queues of one database when asked, and never twice at once."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._begun: float | None = None
        self._counted: float | None = None
        self._counting: asyncio.Task[None] | None = None
        self._told: set[str] = set()  # the queues whose gauges are ours

    async def refresh(self, wait_s: float = WAIT_S) -> bool:
        """Set the gauges from a count that is at most 5 s old; answers whether they are that fresh.

        Waits `wait_s` seconds at most and raises nothing. A database that is slow or away leaves the last count in
        place for a minute, then none; `holdfast_queues_counted_timestamp_seconds` says of when it is.
        """
        now = self._clock.monotonic()
        if self._counting is None and (self._begun is None or now - self._begun >= EVERY_S):
            self._begun = now
            self._counting = asyncio.create_task(self._count(), name="queue-gauges")
        if self._counting is not None:
            # Not cancelled when it is late: a statement in SQLite's thread cannot be stopped, only waited for.
            await asyncio.wait([self._counting], timeout=wait_s)
        age_s = None if self._counted is None else self._clock.monotonic() - self._counted
        if age_s is not None and age_s > KEPT_S:
            self._forget()
        return age_s is not None and age_s < EVERY_S

    async def close(self) -> None:
        """Wait for a count that is under way, and take the gauges away."""
        if self._counting is not None:
            await asyncio.wait([self._counting])
        self._forget()

    async def _count(self) -> None:
        try:
            counted, now_us = self._clock.monotonic(), self._clock.now_us()
            async with self._database.read(snapshot=True) as tx:
                views = await insight.overview(tx, now_us)
            self._tell(views, now_us)
            self._counted = counted
        except Exception as error:  # whatever it is, it must not end a scrape
            log.warning("queues_not_counted", error=repr(error)[:300])
        finally:
            self._counting = None

    def _tell(self, views: list[insight.QueueView], now_us: int) -> None:
        self._remove(self._told - {view.queue for view in views})
        self._told = {view.queue for view in views}
        for view in views:
            for state in STATES:
                observe.queue_messages.labels(view.queue, state).set(getattr(view, state))
            observe.queue_oldest_age.labels(view.queue).set(view.oldest_s)
        observe.queues_counted.set(now_us / US_PER_S)

    def _forget(self) -> None:
        self._remove(self._told)
        self._told = set()
        self._counted = None

    def _remove(self, names: set[str]) -> None:
        for name in names:
            for state in STATES:
                observe.queue_messages.remove(name, state)
            observe.queue_oldest_age.remove(name)
