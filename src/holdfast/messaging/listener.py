"""Listener: receive, decode, handle, settle.

Two kinds of handler. An *effect* runs inside a transaction, for a batch of messages of one type: inbox row, its writes,
its outgoing messages and the ack commit together, so its effect happens once. A *plain* handler gets one message and no
transaction, for work with the outside world; it may run again and must be safe to.

In `auto` mode: success acks; a fatal error parks the message at once; any other error is tried again in this process
(local retries, the message stays unacked), then by durable, delayed redeliveries, then it is parked. In `manual` mode a
plain handler settles by itself, and what it leaves unsettled goes back to the queue when the listener stops. In `none`
mode the message is acked before the handler runs: at most once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import CannotDecode, HandlerTimeout, HoldfastError, InvalidInput, ShuttingDown, Unavailable
from holdfast.messaging.codec import Codec
from holdfast.messaging.inbox import Inbox
from holdfast.messaging.injection import Incoming as Incoming  # noqa: PLC0414  # others take it from here
from holdfast.messaging.message import Delivery, Settlement, ack, park, retry
from holdfast.messaging.pacing import Keys, Outage, Slots
from holdfast.messaging.recover import Recoverer, describe
from holdfast.messaging.retry import Retry, RetryPolicy, is_fatal
from holdfast.messaging.settler import Settler
from holdfast.messaging.transport import Subscription, Transport

Effect = Callable[[Tx, Sequence[Any]], Awaitable[None]]
AckMode = Literal["auto", "manual", "none"]

AWAY_S = 1.0  # how long to wait before asking a database again that was away

log = observe.logger("listener")


Plain = Callable[[Incoming], Awaitable[None]]


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer: its name (the inbox remembers effects under it), its queue, and a handler for each body type."""

    name: str
    queue: str
    effects: Mapping[type, Effect] = {}
    plain: Mapping[type, Plain] = {}
    ack: AckMode = "auto"
    prefetch: int = 200
    concurrency: int = 32  # plain handlers at once
    group: GroupCommit | None = None  # the writer of its effects; the toolkit's own unless given
    recover: Recoverer | None = None  # what becomes of a message that is given up on; the toolkit's own unless given
    time_limit_ms: int | None = None  # for a plain handler; then it is cancelled and the attempt has failed
    key: Callable[[Any], Hashable | None] | None = None  # bodies of one key are handled one after the other, in order
    outage_after: int = 20  # failures in a row after which deliveries are tried one at a time
    outage_wait_ms: int = 1_000  # after each failure then
    local: RetryPolicy = RetryPolicy(tries=3, interval_ms=1_000)
    durable: RetryPolicy = RetryPolicy(tries=10, interval_ms=5_000, multiplier=2.0, jitter=0.1)

    def __post_init__(self) -> None:
        if not self.effects and not self.plain:
            raise InvalidInput(f"listener {self.name!r} has no handler")
        if self.effects and self.ack != "auto":
            raise InvalidInput(f"listener {self.name!r}: effects ack within their transaction; use ack='auto'")
        if self.effects and (self.time_limit_ms is not None or self.key is not None):
            raise InvalidInput(f"listener {self.name!r}: time_limit_ms and key are for plain handlers, not for effects")
        for name in ("prefetch", "concurrency", "outage_after"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"listener {self.name!r}: {name} is at least 1, not {getattr(self, name)}")
        if self.time_limit_ms is not None and self.time_limit_ms < 1:
            raise InvalidInput(f"listener {self.name!r}: time_limit_ms is at least 1, not {self.time_limit_ms}")
        if both := set(self.effects) & set(self.plain):
            raise InvalidInput(f"listener {self.name!r} handles {sorted(kind.__name__ for kind in both)} twice")


class Work:
    """A delivery on its way: what it says, who handles it, and where it is settled."""

    __slots__ = ("body", "delivery", "handler", "is_effect", "settler", "subscription")

    def __init__(self, delivery: Delivery, subscription: Subscription, settler: Settler) -> None:
        self.delivery = delivery
        self.subscription = subscription
        self.settler = settler
        self.body: Any = None
        self.handler: Any = None
        self.is_effect = False

    async def settle(self, settlement: Settlement) -> None:
        """Settle it in the handler's name, at once."""
        await self.subscription.settle([settlement])


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
        if listen.effects and not transport.features.shares_database:
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
        self._handlers: dict[type, tuple[bool, Any]] = {
            **{kind: (True, effect) for kind, effect in listen.effects.items()},
            **{kind: (False, handler) for kind, handler in listen.plain.items()},
        }
        self._prefetch = listen.prefetch
        self._running: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._pump: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin to take messages."""
        self._pump = asyncio.create_task(self._run(), name=f"listener-{self._listen.name}")

    async def stop(self, drain_s: float = 10.0) -> None:
        """Stop taking, let running handlers finish for at most `drain_s`, give the rest back to the queue."""
        self._stopping.set()
        if self._subscription is not None:
            self._subscription.stop()
        if self._pump is not None:
            _, late = await asyncio.wait([self._pump, *self._running], timeout=drain_s)
            for task in late:
                task.cancel()
            await asyncio.wait([self._pump, *late])

    @property
    def concurrency(self) -> int:
        """How many plain handlers run at once; may be changed at any time."""
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
        if self._subscription is not None:
            self._subscription.limit(prefetch)

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
                if self._running:
                    await asyncio.wait(self._running)
            finally:
                await settler.finish()

    def _begin(self, subscription: Subscription, settler: Settler, deliveries: Sequence[Delivery]) -> None:
        """Start the work on each delivery; effects go together, since one transaction is to take many of them."""
        together: list[Work] = []
        for delivery in deliveries:
            work = Work(delivery, subscription, settler)
            try:
                work.body = self._codec.decode(delivery.message)
                work.is_effect, work.handler = self._handler(delivery, work.body)
            except CannotDecode as error:
                self._spawn(self._give_up(work, error))
                continue
            if work.is_effect and not self._outage.on:
                together.append(work)
            else:
                self._spawn(self._one(work))
        if together:
            self._spawn(self._all(together))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _handler(self, delivery: Delivery, body: Any) -> tuple[bool, Any]:
        handler = self._handlers.get(type(body))
        if handler is None:
            raise CannotDecode(f"listener {self._listen.name!r} has no handler for type {delivery.message.type!r}")
        return handler

    async def _give_up(self, work: Work, error: Exception) -> None:
        with observe.trace_from(work.delivery.message.headers):
            work.settler.add(await self._recover(work.delivery, error))

    async def _all(self, works: list[Work]) -> None:
        """See effects to their end: many in one transaction, and those that fail one by one again."""
        for work, failure in zip(works, await self._call_all(works), strict=True):
            if failure is None:
                self._outage.worked()
            else:
                self._count(failure, again=work.delivery.attempt > 1)
                self._spawn(self._one(work, failure))

    async def _one(self, work: Work, failure: Exception | None = None) -> None:
        """See one delivery to its end; whatever happens here, an unsettled message comes again.

        `failure` is what a first call of the handler failed with, if there was one.
        """
        with observe.trace_from(work.delivery.message.headers):
            key = self._listen.key
            if key is None:
                failure = await self._try_locally(work, failure)
            else:
                async with self._keys.turn(key(work.body)):
                    failure = await self._try_locally(work, failure)
            settlement = await self._settlement(work.delivery, failure)
            if settlement is not None:
                work.settler.add(settlement)

    async def _settlement(self, delivery: Delivery, failure: Exception | None) -> Settlement | None:
        """How to settle; None when that is done already or not ours to do."""
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
            if wait_ms is None or self._stopping.is_set():
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
            await self._pause(wait_ms / 1_000)

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
        if work.is_effect:
            await self._group.submit(self._apply, work)
            return
        async with self._slots:
            if self._stopping.is_set():
                raise ShuttingDown("stopped before this message's turn")
            if self._listen.ack == "none" and not await work.settler.settle([ack(work.delivery)]):
                return  # it may come again, so nobody may have handled it
            incoming = Incoming(body=work.body, delivery=work.delivery, settle=work.settle)
            if self._listen.time_limit_ms is None:
                await work.handler(incoming)
            else:
                await self._in_time(work.handler(incoming), self._listen.time_limit_ms)

    async def _call_all(self, works: Sequence[Work]) -> list[Exception | None]:
        """Run the effects of many messages; answers what each failed with."""
        return await self._group.submit_all(self._apply, works)

    @staticmethod
    async def _in_time(work: Awaitable[None], limit_ms: int) -> None:
        limit = asyncio.timeout(limit_ms / 1_000)
        try:
            async with limit:
                await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise HandlerTimeout(f"not done within {limit_ms} ms; it was cancelled") from error

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

    async def _apply(self, tx: Tx, works: Sequence[Work]) -> list[HoldfastError | None]:
        """Decide a batch: claim in the inbox, run the effects by type, ack; all in `tx`."""
        fresh = await self._inbox.fresh(tx, self._listen.name, [work.delivery.message.message_id for work in works])
        bodies: dict[type, list[Any]] = {}
        for work in works:
            message = work.delivery.message
            tx.caused(work.body, observe.trace_in(message.headers))
            if message.message_id in fresh:
                fresh.discard(message.message_id)  # a second copy in this very batch is a duplicate
                bodies.setdefault(type(work.body), []).append(work.body)
        for kind, batch in bodies.items():
            await self._listen.effects[kind](tx, batch)
        await works[0].subscription.settle([ack(work.delivery) for work in works], tx)
        return [None for _ in works]

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until the stop."""
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({timer, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            stop.cancel()
