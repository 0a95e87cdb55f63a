"""Faults: scripts of what goes wrong on the way from a queue to a handler, for tests.

They act where a listener of the test bus takes messages, so it does not matter how a message came into its queue. Each
script happens so many times and is then used up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging.listener import Listener, Work
from holdfast.messaging.message import Delivery, Settlement, ack
from holdfast.messaging.transport import Subscription

Copy = Callable[[Delivery], Awaitable[None]]
"""Puts a second copy of a delivery's message, with the same message id, into its queue."""


class ScriptedFailure(Exception):
    """What a handler fails with when the script names no error of its own."""


class Faults:
    """What is to go wrong, by queue; every method adds to the script."""

    def __init__(self) -> None:
        self._drops: Counter[str] = Counter()
        self._duplicates: Counter[str] = Counter()
        self._reorders: dict[str, list[int]] = {}
        self._failures: dict[str, list[Exception]] = {}

    def drop(self, queue: str, n: int = 1) -> None:
        """The next `n` messages taken from the queue are lost: confirmed when published, and handled by nobody."""
        self._drops[queue] += _positive("n", n)

    def duplicate(self, queue: str, n: int = 1) -> None:
        """Each of the next `n` messages taken from the queue comes once more, under the same message id."""
        self._duplicates[queue] += _positive("n", n)

    def reorder(self, queue: str, n: int = 2) -> None:
        """The next `n` messages taken from the queue are handed over together, the last one first.

        The first of them waits (unacked) until the last is there. No more than the listener's prefetch are held.
        """
        if n < 2:
            raise InvalidInput(f"reorder needs two messages or more, not {n}")
        self._reorders.setdefault(queue, []).append(n)

    def fail(self, queue: str, times: int = 1, error: Exception | None = None) -> None:
        """The next `times` calls of a handler of the queue raise `error` before the handler runs.

        Every attempt is a call, local retries included: `times=3` uses up the three tries of the default local policy.
        """
        _positive("times", times)
        scripted = ScriptedFailure("scripted by the test") if error is None else error
        self._failures.setdefault(queue, []).extend([scripted] * times)

    @property
    def left(self) -> dict[str, dict[str, int]]:
        """What has not happened yet: queue -> fault -> how many times. Empty once all scripts are used up."""
        counts: dict[str, dict[str, int]] = {}
        for name, by_queue in (
            ("drop", dict(self._drops)),
            ("duplicate", dict(self._duplicates)),
            ("reorder", {queue: len(each) for queue, each in self._reorders.items()}),
            ("fail", {queue: len(each) for queue, each in self._failures.items()}),
        ):
            for queue, count in by_queue.items():
                if count:
                    counts.setdefault(queue, {})[name] = count
        return counts

    def drops(self, queue: str) -> bool:
        """Whether the message at hand is to be lost."""
        return _used(self._drops, queue)

    def duplicates(self, queue: str) -> bool:
        """Whether the message at hand is to come twice."""
        return _used(self._duplicates, queue)

    def turns_round(self, queue: str) -> int:
        """How many messages are to be handed over in reverse now; 1 means none."""
        script = self._reorders.get(queue)
        return script.pop(0) if script else 1

    def failure(self, queue: str) -> Exception | None:
        """What the call at hand is to fail with."""
        script = self._failures.get(queue)
        return script.pop(0).with_traceback(None) if script else None


class FaultySubscription:
    """A subscription whose deliveries go through the script."""

    def __init__(self, inner: Subscription, queue: str, faults: Faults, copy: Copy, *, prefetch: int) -> None:
        self._inner = inner
        self._queue = queue
        self._faults = faults
        self._copy = copy
        self._prefetch = prefetch

    async def take(self) -> list[Delivery]:
        deliveries = await self._take_some()
        if not deliveries:
            return []
        wanted = min(self._faults.turns_round(self._queue), self._prefetch)
        while len(deliveries) < wanted:
            more = await self._take_some()
            if not more:
                return []  # stopped meanwhile; what is held goes back to the queue
            deliveries += more
        return [*reversed(deliveries[:wanted]), *deliveries[wanted:]]

    async def _take_some(self) -> list[Delivery]:
        """The next deliveries that are not lost; none only when the subscription was stopped."""
        while taken := await self._inner.take():
            kept = []
            for delivery in taken:
                if self._faults.drops(self._queue):
                    await self._inner.settle([ack(delivery)])
                    continue
                if self._faults.duplicates(self._queue):
                    await self._copy(delivery)
                kept.append(delivery)
            if kept:
                return kept
        return []

    async def settle(self, settlements: Sequence[Settlement], tx: Tx | None = None) -> None:
        await self._inner.settle(settlements, tx)

    def limit(self, prefetch: int) -> None:
        self._inner.limit(prefetch)

    def stop(self) -> None:
        self._inner.stop()

    async def __aenter__(self) -> FaultySubscription:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whoever entered the subscription within leaves it."""


class FaultyListener(Listener):
    """A listener that takes through the script, and whose handler fails where the script says so."""

    def script(self, faults: Faults, copy: Copy) -> None:
        """Follow this script; to be called before the start."""
        self._faults = faults
        self._copy = copy

    async def _take_all(self, subscription: Subscription) -> None:
        listen = self._listen
        await super()._take_all(
            FaultySubscription(subscription, listen.queue, self._faults, self._copy, prefetch=listen.prefetch)
        )

    async def _call(self, work: Work) -> None:
        if (failure := self._faults.failure(work.delivery.queue)) is None:
            await super()._call(work)
            return
        if self._listen.ack == "none":  # such a message is acked before its handler is called, whatever follows
            await work.settler.settle([ack(work.delivery)])
        raise failure

    async def _call_many(self, works: Sequence[Work]) -> Sequence[Exception | None]:
        failures = [self._faults.failure(work.delivery.queue) for work in works]
        spared = [work for work, failure in zip(works, failures, strict=True) if failure is None]
        if self._listen.ack == "none":
            struck = [work for work, failure in zip(works, failures, strict=True) if failure is not None]
            await works[0].settler.settle([ack(work.delivery) for work in struck])
        outcomes = iter(await super()._call_many(spared) if spared else [])
        return [failure or next(outcomes) for failure in failures]


def _positive(name: str, count: int) -> int:
    if count < 1:
        raise InvalidInput(f"{name} is at least 1, not {count}")
    return count


def _used(script: Counter[str], queue: str) -> bool:
    if not script[queue]:
        return False
    script[queue] -= 1
    return True
