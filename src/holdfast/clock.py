"""SystemClock and ManualClock: the only source of now() and sleep() (a test forbids every other one)."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

US_PER_S = 1_000_000
US_PER_MS = 1_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock(Protocol):
    """Two clocks in one: the wall for instants that are stored, the monotonic one for durations."""

    def now_us(self) -> int:
        """Wall time in microseconds since 1970-01-01 UTC; it may jump when the operator sets the clock."""
        ...

    def monotonic(self) -> float:
        """Seconds that only ever grow; for measuring and for deadlines inside one process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait at least so many seconds; zero or less yields to the loop once."""
        ...


class SystemClock:
    """The machine's clocks and the running event loop's timer."""

    def now_us(self) -> int:
        return time.time_ns() // 1_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class ManualClock:
    """A clock that moves only when told to, for tests and simulations: `advance` wakes every sleeper that is due."""

    def __init__(self, start_us: int = 1_700_000_000 * US_PER_S) -> None:
        self._now_us = start_us
        self._elapsed_us = 0
        self._order = itertools.count()
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []

    def now_us(self) -> int:
        return self._now_us

    def monotonic(self) -> float:
        return self._elapsed_us / US_PER_S

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due_us = self._elapsed_us + round(seconds * US_PER_S)
        heapq.heappush(self._sleepers, (due_us, next(self._order), future))
        await future

    def advance(self, seconds: float) -> None:
        """Move both clocks forward and wake who is due, in order of their instants.

        Raises `ValueError` for a negative step: the monotonic clock never goes back (use `jump_wall` for that).
        """
        if seconds < 0:
            raise ValueError("the monotonic clock cannot go back; use jump_wall() to move the wall clock")
        step_us = round(seconds * US_PER_S)
        self._elapsed_us += step_us
        self._now_us += step_us
        while self._sleepers and self._sleepers[0][0] <= self._elapsed_us:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)

    def next_wake_us(self) -> int | None:
        """Microseconds until the next sleeper is due; None when nobody sleeps."""
        while self._sleepers and self._sleepers[0][2].done():  # was cancelled meanwhile
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] - self._elapsed_us if self._sleepers else None

    def jump_wall(self, seconds: float) -> None:
        """Move only the wall clock, forward or back, as an operator or NTP would."""
        self._now_us += round(seconds * US_PER_S)


def rfc3339(instant_us: int) -> str:
    """Write microseconds since the epoch as RFC 3339 in UTC, e.g. `2026-01-31T08:30:00.000000Z`."""
    instant = _EPOCH + timedelta(microseconds=instant_us)
    return instant.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def microseconds(instant: datetime) -> int:
    """Turn an aware datetime into microseconds since the epoch; raises `ValueError` for a naive one."""
    if instant.tzinfo is None:
        raise ValueError("a time needs a zone; write it as 2026-01-31T08:30:00Z")
    return (instant - _EPOCH) // timedelta(microseconds=1)
