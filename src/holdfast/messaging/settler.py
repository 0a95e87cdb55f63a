"""Settler: what is done is settled in batches; while one batch is being settled, the next gathers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from holdfast import observe
from holdfast.errors import HoldfastError
from holdfast.messaging.message import Settlement, park
from holdfast.messaging.recover import describe
from holdfast.messaging.transport import Subscription

ROUNDS = 4  # so many batches of acks what is not an ack waits for company; no longer than there are acks

log = observe.logger("listener")


class Settler:
    """Settles deliveries of one subscription without making their handlers wait.

    A transport that is away is asked again until `stopping` is set: settling twice does no harm, and what stays
    unsettled comes again. `pause` waits between the tries.
    """

    def __init__(
        self, subscription: Subscription, pause: Callable[[], Awaitable[None]], stopping: asyncio.Event
    ) -> None:
        self._subscription = subscription
        self._pause = pause
        self._stopping = stopping
        # Acks apart from the rest: a transport removes many messages in no time, and they need not wait for the few
        # that it has to put back or park, which cost as much for one as for ten.
        self._gathered: dict[bool, list[Settlement]] = {True: [], False: []}
        self._flushing: dict[bool, asyncio.Task[None]] = {}
        self._rounds = 0
        self._round_over = asyncio.Event()

    def add(self, settlement: Settlement) -> None:
        """Settle it with whatever else is done by the next turn of the event loop."""
        is_ack = settlement.kind == "ack"
        self._gathered[is_ack].append(settlement)
        if is_ack not in self._flushing:
            name = f"settle-{settlement.delivery.queue}"
            self._flushing[is_ack] = asyncio.create_task(self._flush(is_ack), name=name)

    async def finish(self) -> None:
        """Wait until all that was added is settled, or given up on."""
        while self._flushing:
            await asyncio.wait(self._flushing.values())

    async def in_the_name_of_a_handler(self, settlement: Settlement) -> None:
        """Settle one at once, and raise what goes wrong: in manual mode the handler decides."""
        await self._subscription.settle([settlement])

    async def settle(self, settlements: Sequence[Settlement]) -> bool:
        """Settle at once; False when that was given up."""
        if not settlements:
            return True
        while True:
            try:
                await self._subscription.settle(settlements)
            except Exception as error:
                log.warning("settle_failed", queue=settlements[0].delivery.queue, error=repr(error)[:300])
                if not (isinstance(error, HoldfastError) and error.retryable):
                    return await self._one_by_one(settlements, error)
                if self._stopping.is_set():
                    return False
                await self._pause()
            else:
                return True

    async def _one_by_one(self, settlements: Sequence[Settlement], error: Exception) -> bool:
        """One that cannot be settled leaves its neighbours alone; what no database can store is parked instead.

        Most often somebody settled it before; then nothing is left to do.
        """
        if len(settlements) > 1:
            return all([await self.settle([each]) for each in settlements if not each.delivery.settled])
        (alone,) = settlements
        if alone.kind in ("retry", "reject") and not alone.delivery.settled:
            await self.settle([park(alone.delivery, describe(error))])
        return False

    async def _flush(self, is_ack: bool) -> None:
        try:
            while self._gathered[is_ack]:
                if not is_ack:
                    await self._gather_more()
                batch = self._gathered[is_ack]
                self._gathered[is_ack] = []
                await self.settle(batch)
                if is_ack:
                    self._end_round()
        finally:
            del self._flushing[is_ack]
            self._end_round()

    async def _gather_more(self) -> None:
        last = self._rounds + ROUNDS
        while True in self._flushing and self._rounds < last:
            self._round_over.clear()
            await self._round_over.wait()

    def _end_round(self) -> None:
        self._rounds += 1
        self._round_over.set()
