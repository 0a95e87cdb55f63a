"""Listener: receive, decode, handle, settle.

Three kinds of handler. An *effect* runs inside a transaction: inbox row, its writes, its outgoing messages and the ack
commit together, so its effect happens once. A *plain* handler gets one message and a *batch* handler several, without a
transaction, for work with the outside world; they may run again and must be safe to.

In `auto` mode: success acks; a fatal error parks the message at once; any other error is tried again in this process
(local retries, the message stays unacked), then by durable, delayed redeliveries, then it is parked. In `manual` mode a
handler settles by itself, and what it leaves unsettled goes back to the queue when the listener stops. In `none` mode
the message is acked before the handler runs: at most once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from typing import Any, TypeVar

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import CannotDecode, HandlerTimeout, HoldfastError, InvalidInput, ShuttingDown, Unavailable
from holdfast.messaging import tracing
from holdfast.messaging.codec import Codec
from holdfast.messaging.handlers import Bound
from holdfast.messaging.inbox import Inbox
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery, Settlement, ack, park, retry
from holdfast.messaging.pacing import Keys, Outage, Slots
from holdfast.messaging.recover import Recoverer, describe
from holdfast.messaging.retry import Retry, is_fatal
from holdfast.messaging.settler import Settler
from holdfast.messaging.transport import Subscription, Transport

ASIDE_MAX = 1_000  # messages that wait for a local retry at once; beyond that a failure is put back at once
AWAY_S = 1.0  # how long to wait before asking a database again that was away

T = TypeVar("T")

log = observe.logger("listener")


class Work:
    """A delivery on its way: what it says, who handles it, and where it is settled."""

    __slots__ = ("bound", "delivery", "incoming", "settler", "subscription")

    def __init__(
        self, subscription: Subscription, settler: Settler, delivery: Delivery, body: Any, bound: Bound
    ) -> None:
        self.subscription = subscription
        self.settler = settler
        self.delivery = delivery
        self.incoming: Incoming = Incoming(body=body, delivery=delivery, settle=settler.in_the_name_of_a_handler)
        self.bound = bound


class Listener:
    """Runs one `Listen` until stopped."""

    def __init__(
        self,
        listen: Listen,
        *,
        transport: Transport,
        group: GroupCommit,
        inbox: Inbox,
        codec: Codec,
        clock: Clock,
        recover: Recoverer,
    ) -> None:
        self._bounds = listen.bound(clock)
        if not transport.features.shares_database and any(each.kind == "effect" for each in self._bounds.values()):
            raise InvalidInput(f"listener {listen.name!r}: effects need a transport that shares the database")
        self._listen = listen
        self._transport = transport
        self._group = listen.group or group
        self._recoverer = listen.recover or recover
        self._inbox = inbox
        self._codec = codec
        self._clock = clock
        self._chance = random.Random()  # noqa: S311  # jitter
        self._slots = Slots(listen.concurrency)
        self._keys = Keys()
        self._outage = Outage(listen.outage_after, listen.outage_wait_ms / 1_000)
        self._prefetch = listen.prefetch  # 0 while paused
        self._aside = 0  # messages that wait for a local retry
        self._running: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._pump: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._naps: set[asyncio.Future[None]] = set()  # of those who wait; a stop ends them

    def start(self) -> None:
        """Begin to take messages."""
        observe.tracer()  # asked once, not for each delivery
        self._pump = asyncio.create_task(self._run(), name=f"listener-{self._listen.name}")

    async def stop(self, drain_s: float = 10.0) -> None:
        """Stop taking, let running handlers finish for at most `drain_s`, give the rest back to the queue."""
        self._stopping.set()
        for nap in self._naps:
            nap.cancel()
        if self._subscription is not None:
            self._subscription.stop()
        if self._pump is not None:
            _, late = await asyncio.wait([self._pump], timeout=drain_s)  # which waits for all that runs
            if late:
                late |= self._running
                for task in late:
                    task.cancel()
                await asyncio.wait(late)

    @property
    def concurrency(self) -> int:
        """How many handlers run at once, effects aside; may be changed at any time."""
        return self._slots.size

    @concurrency.setter
    def concurrency(self, size: int) -> None:
        if size < 1:
            raise InvalidInput(f"concurrency is at least 1, not {size}; use pause() to stop taking messages")
        self._slots.resize(size)

    def pause(self) -> None:
        """Take no more messages until `resume`; what was taken is finished."""
        self._limit(0)

    def resume(self) -> None:
        """Take messages again."""
        self._limit(self._listen.prefetch)

    def _limit(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._set_aside(0)

    def _set_aside(self, more: int) -> None:
        """Messages that wait for a local retry take no room from others, or a few poisonous ones would stop a queue."""
        self._aside += more
        if self._subscription is not None:
            self._subscription.limit(self._prefetch + self._aside if self._prefetch else 0)

    # -- taking -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Consume until stopped; a queue that is missing, or a database that is away, is asked for again and again."""
        while not self._stopping.is_set():
            subscription = self._transport.subscribe(self._listen.queue, prefetch=self._prefetch)
            self._subscription = subscription
            entered = False
            try:
                async with subscription:
                    entered = True
                    await self._take_all(subscription)
                    return
            except HoldfastError as error:
                if entered:
                    # Giving back failed; the leases run out and the messages come again.
                    log.warning("listener_stopped_unclean", listener=self._listen.name, error=error.code)
                    return
                log.warning("cannot_listen", listener=self._listen.name, error=error.code, detail=error.detail)
                await self._pause(AWAY_S)

    async def _take_all(self, subscription: Subscription) -> None:
        settler = Settler(subscription, lambda: self._pause(AWAY_S), self._stopping)
        try:
            while not self._stopping.is_set():
                try:
                    deliveries = await subscription.take()
                except HoldfastError as error:
                    if isinstance(error, ShuttingDown):
                        return
                    log.warning("queue_unavailable", queue=self._listen.queue, error=error.code, detail=error.detail)
                    await self._pause(AWAY_S)
                    continue
                self._begin(subscription, settler, deliveries)
        finally:
            try:
                while self._running:  # a batch that fails starts more
                    await asyncio.wait(self._running)
            finally:
                await settler.finish()

    def _begin(self, subscription: Subscription, settler: Settler, deliveries: Sequence[Delivery]) -> None:
        """Start the work on each delivery; effects go together, and so does what one batch handler takes."""
        together: dict[str | int, list[Work]] = {}
        # In an outage one is tried at a time; and where spans are made, each effect has one of its own.
        alone = self._outage.on
        alone_too = observe.known_tracer() is not None
        for delivery in deliveries:
            try:
                body = self._codec.decode(delivery.message)
                bound = self._bound(delivery, body)
            except CannotDecode as error:
                self._spawn(self._give_up(settler, delivery, error))
                continue
            work = Work(subscription, settler, delivery, body, bound)
            if bound.kind == "plain" or alone or (alone_too and bound.kind == "effect"):
                self._spawn(self._one(work))
            else:
                together.setdefault("effects" if bound.kind == "effect" else id(bound), []).append(work)
        for which, works in together.items():
            at_most = len(works) if which == "effects" else self._listen.batch_max
            for start in range(0, len(works), at_most):
                self._spawn(self._many(works[start : start + at_most]))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _bound(self, delivery: Delivery, body: Any) -> Bound:
        bound = self._bounds.get(type(body))
        if bound is None:
            raise CannotDecode(f"listener {self._listen.name!r} has no handler for type {delivery.message.type!r}")
        return bound

    async def _give_up(self, settler: Settler, delivery: Delivery, error: Exception) -> None:
        with tracing.processing(delivery):
            settler.add(await self._recover(delivery, tracing.failed(error)))

    # -- handling -----------------------------------------------------------------------------------------------------

    async def _many(self, works: list[Work]) -> None:
        """See several deliveries to their end: in one call, and those that fail one by one again."""
        for work, failure in zip(works, await self._call_many(works), strict=True):
            if failure is None:
                self._outage.worked()
                if self._listen.ack == "auto" and not work.delivery.settled:
                    work.settler.add(ack(work.delivery))
            else:
                self._count(failure, again=work.delivery.attempt > 1)
                self._spawn(self._one(work, failure))

    async def _one(self, work: Work, failure: Exception | None = None) -> None:
        """See one delivery to its end; whatever happens here, an unsettled message comes again.

        `failure` is what a first call of the handler failed with, if there was one.
        """
        with tracing.processing(work.delivery):
            if self._listen.key is None:
                failure = await self._try_locally(work, failure)
            else:
                failure = await self._in_turn(work, self._listen.key)
            settlement = await self._settlement(work.delivery, failure)
            if settlement is not None:
                work.settler.add(settlement)

    async def _in_turn(self, work: Work, key_of: Callable[[Any], Hashable | None]) -> Exception | None:
        try:
            key = key_of(work.incoming.body)
            hash(key)
        except Exception as error:
            return error
        async with self._keys.turn(key):
            return await self._try_locally(work, None)

    async def _settlement(self, delivery: Delivery, failure: Exception | None) -> Settlement | None:
        """How to settle; None when that is done already or not ours to do."""
        tracing.failed(failure)
        if self._listen.ack != "auto":
            if failure is not None and not isinstance(failure, ShuttingDown):
                log.error("handler_failed", queue=delivery.queue, error=repr(failure)[:300], ack=self._listen.ack)
            return None
        if failure is None:
            return None if delivery.settled else ack(delivery)
        return await self._after_failure(delivery, failure)

    async def _try_locally(self, work: Work, failure: Exception | None) -> Exception | None:
        """Call until it succeeds or the local policy gives up; answers the last error."""
        attempt = 1
        while True:
            if failure is None:
                failure = await self._carefully(work, again=attempt > 1 or work.delivery.attempt > 1)
                if failure is None:
                    return None
            wait_ms = None
            if self._listen.ack == "auto" and not isinstance(failure, (Retry, ShuttingDown)):
                wait_ms = self._listen.local.delay_ms(attempt, failure, self._chance)
            if wait_ms is None or self._aside >= ASIDE_MAX or self._stopping.is_set():
                return failure
            log.info(
                "handler_failed_trying_again",
                listener=self._listen.name,
                message_id=work.delivery.message.message_id,
                attempt=attempt,
                error=repr(failure)[:300],
            )
            attempt += 1
            failure = None
            self._set_aside(1)
            try:
                await self._pause(wait_ms / 1_000)
            finally:
                self._set_aside(-1)

    async def _carefully(self, work: Work, *, again: bool) -> Exception | None:
        """Call, and count failures in a row; while everything fails, one at a time and slowly."""
        if self._outage.on:
            async with self._outage.one_at_a_time:
                if self._outage.on:
                    return await self._counted(work, again=again)
        return await self._counted(work, again=again)  # also who waited for his turn while the outage ended

    async def _counted(self, work: Work, *, again: bool) -> Exception | None:
        try:
            await self._call(work)
        except Exception as error:
            if self._count(error, again=again) and self._outage.on:
                log.warning("outage", listener=self._listen.name, failures_in_a_row=self._outage.failures)
                await self._pause(self._outage.wait_s)
            return error
        self._outage.worked()
        return None

    def _count(self, error: Exception, *, again: bool) -> bool:
        """Count a failure, if it is one that a neighbour who is away would cause."""
        if isinstance(error, (Retry, ShuttingDown)) or is_fatal(error, self._listen.local.fatal):
            return False
        self._outage.failed(again=again)
        return True

    async def _call(self, work: Work) -> None:
        """Run the handler once."""
        if work.bound.kind == "effect":
            await self._group.submit(self._apply, work)
            return
        if work.bound.kind == "batch":
            (failure,) = await self._call_batch([work])
            if failure is not None:
                raise failure
            return
        async with self._slots:
            if await self._may_call([work]):
                await self._limited(work.bound.call(work.incoming))

    async def _call_many(self, works: Sequence[Work]) -> Sequence[Exception | None]:
        """Run effects, or one batch handler, once for all of these; answers what each failed with."""
        if works[0].bound.kind == "effect":
            return await self._group.submit_all(self._apply, works)
        return await self._call_batch(works)

    async def _call_batch(self, works: Sequence[Work]) -> Sequence[Exception | None]:
        async with self._slots:
            try:
                if not await self._may_call(works):
                    return [None] * len(works)
                with tracing.processing_many(self._listen.queue, [work.delivery for work in works]):
                    call: Awaitable[Sequence[Exception | None]]
                    call = works[0].bound.call([work.incoming for work in works])
                    return await self._limited(call)
            except (ShuttingDown, HandlerTimeout) as error:
                return [error] * len(works)

    async def _may_call(self, works: Sequence[Work]) -> bool:
        """In mode `none` ack first: what could not be acked may come again, so nobody may have handled it.

        Raises `ShuttingDown` for those whose turn came too late.
        """
        if self._stopping.is_set():
            raise ShuttingDown("stopped before this message's turn")
        return self._listen.ack != "none" or await works[0].settler.settle([ack(work.delivery) for work in works])

    def _limited(self, work: Awaitable[T]) -> Awaitable[T]:
        """The work under the time limit, if there is one."""
        limit_ms = self._listen.time_limit_ms
        return work if limit_ms is None else self._in_time(work, limit_ms)

    @staticmethod
    async def _in_time(work: Awaitable[T], limit_ms: int) -> T:
        limit = asyncio.timeout(limit_ms / 1_000)
        try:
            async with limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise HandlerTimeout(f"not done within {limit_ms} ms; it was cancelled") from error

    async def _apply(self, tx: Tx, works: Sequence[Work]) -> list[HoldfastError | None]:
        """Decide a batch: claim in the inbox, run the effects, ack; all in `tx`."""
        fresh = await self._inbox.fresh(tx, self._listen.name, [work.delivery.message.message_id for work in works])
        batches: dict[int, tuple[Bound, list[Incoming]]] = {}
        for work in works:
            tx.caused(work.incoming.body, tracing.trace_of(work.delivery))
            if work.delivery.message.message_id in fresh:
                fresh.discard(work.delivery.message.message_id)  # a second copy in this very batch is a duplicate
                batches.setdefault(id(work.bound), (work.bound, []))[1].append(work.incoming)
        for bound, batch in batches.values():
            with _applying(self._listen.queue, tx, batch):
                await bound.call(tx, batch)
        await works[0].subscription.settle([ack(work.delivery) for work in works], tx)
        return [None for _ in works]

    # -- giving up ----------------------------------------------------------------------------------------------------

    async def _recover(self, delivery: Delivery, error: Exception) -> Settlement:
        """Hand a message that is given up on to the recoverer; one that fails itself loses nothing."""
        try:
            return await self._recoverer.recover(self._transport, delivery, error)
        except Exception:
            log.exception("recoverer_failed", listener=self._listen.name, message_id=delivery.message.message_id)
            return park(delivery, describe(error))

    async def _after_failure(self, delivery: Delivery, error: Exception) -> Settlement | None:
        if isinstance(error, ShuttingDown):
            return None
        if isinstance(error, Retry):
            return retry(delivery, error.after_ms, counts=False, reason=error.detail)
        if isinstance(error, Unavailable):
            # The database or a neighbour is away; that is no fault of this message, however long it lasts.
            return retry(delivery, self._listen.durable.interval_ms, counts=False, reason=error.detail)
        wait_ms = self._listen.durable.delay_ms(delivery.attempt, error, self._chance)
        if wait_ms is None:
            return await self._recover(delivery, error)
        return retry(delivery, wait_ms, reason=repr(error)[:300])

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until the stop."""
        if self._stopping.is_set():
            return
        nap = asyncio.ensure_future(self._clock.sleep(seconds))
        self._naps.add(nap)
        try:
            await asyncio.wait([nap])
        finally:
            self._naps.discard(nap)
            nap.cancel()


def _applying(queue: str, tx: Tx, batch: Sequence[Incoming]) -> Any:
    return tracing.together("apply", queue, lambda: [tx.trace_of(incoming.body) for incoming in batch], len(batch))
