"""Wake-ups tell waiting subscriptions that a queue has something; hints that may get lost: polling is the guard."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from holdfast.clock import Clock

CHANNEL = "holdfast_queue"  # of LISTEN and NOTIFY
NEVER_US = 1 << 62


def hint(instance: int, due_us: int, queue: str) -> str:
    """The payload of a NOTIFY by that instance: something is due in the queue at that instant."""
    return f"{instance} {due_us} {queue}"


class Waiter:
    """One subscription's ear: it sleeps until a message of its queue is due, or for a while."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._event = asyncio.Event()
        self._until_us = 0
        self._looking = False
        self._told_us = NEVER_US  # the soonest instant that was told during a look

    def tell(self, due_us: int) -> None:
        """Something is due at that instant; wakes the sleeper if that is before it would wake anyway.

        Told during a look it shortens the sleep that follows, and no more than that: what is due in an hour is no
        reason to look again at once.
        """
        if self._looking:
            self._told_us = min(self._told_us, due_us)
        elif due_us < self._until_us:
            self._event.set()

    def wake(self) -> None:
        """Wake the sleeper, or make its next sleep return at once."""
        self._event.set()

    def begin(self) -> None:
        """Forget what was told so far; to be called before looking, so that nothing told during the look is lost."""
        self._event.clear()
        self._looking, self._told_us = True, NEVER_US

    async def sleep(self, until_us: int) -> None:
        """Sleep until the instant or until woken."""
        until_us = self._until_us = min(until_us, self._told_us)
        self._looking = False
        seconds = (until_us - self._clock.now_us()) / 1_000_000
        if self._event.is_set() or seconds <= 0:
            return
        woken = asyncio.ensure_future(self._event.wait())
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait({woken, timer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
            timer.cancel()


class Wakeups:
    """All waiters of this process, by queue."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[Waiter]] = {}

    def add(self, queue: str, waiter: Waiter) -> None:
        self._waiters.setdefault(queue, set()).add(waiter)

    def remove(self, queue: str, waiter: Waiter) -> None:
        self._waiters.get(queue, set()).discard(waiter)

    def tell(self, dues: Iterable[tuple[str, int]]) -> None:
        """For each (queue, instant) wake who waits for it."""
        for queue, due_us in dues:
            for waiter in self._waiters.get(queue, ()):
                waiter.tell(due_us)
