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
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import CannotDecode, HandlerTimeout, HoldfastError, InvalidInput, ShuttingDown, Unavailable
from holdfast.messaging import tracing
from holdfast.messaging.codec import Codec
from holdfast.messaging.inbox import Inbox
from holdfast.messaging.message import Delivery, Settlement, ack, park, retry
from holdfast.messaging.pacing import Keys, Outage, Slots
from holdfast.messaging.recover import Recoverer, describe
from holdfast.messaging.retry import Retry, RetryPolicy, is_fatal
from holdfast.messaging.transport import Subscription, Transport

Effect = Callable[[Tx, Sequence[Any]], Awaitable[None]]
AckMode = Literal["auto", "manual", "none"]

AWAY_S = 1.0  # how long to wait before asking a database again that was away

log = observe.logger("listener")


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """What a plain handler gets: the decoded body, the delivery, and the way to settle it in manual mode."""

    body: Any
    delivery: Delivery
    settle: Callable[[Settlement], Awaitable[None]]


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
        self._prefetch = listen.prefetch
        self._running: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._pump: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin to take messages."""
        observe.tracer()  # asked once, not for each delivery
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
                for delivery in deliveries:
                    task = asyncio.create_task(self._process(subscription, delivery))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
        finally:
            if self._running:
                await asyncio.wait(self._running)

    async def _process(self, subscription: Subscription, delivery: Delivery) -> None:
        """See one delivery to its end; whatever happens here, an unsettled message comes again."""
        with tracing.processing(delivery):
            settlement = await self._handle(subscription, delivery)
            if settlement is not None:
                await self._settle(subscription, settlement)

    async def _settle(self, subscription: Subscription, settlement: Settlement) -> bool:
        """Settle, asking again while the transport is away (twice does no harm); False when that was given up."""
        while True:
            try:
                await subscription.settle([settlement])
            except HoldfastError as error:
                log.warning("settle_failed", queue=settlement.delivery.queue, error=error.code, detail=error.detail)
                if self._stopping.is_set() or not error.retryable:
                    return False
                await self._pause(AWAY_S)
            else:
                return True

    async def _handle(self, subscription: Subscription, delivery: Delivery) -> Settlement | None:
        """Run the handler and say how to settle; None when that is done already or not ours to do."""
        try:
            body = self._codec.decode(delivery.message)
            call = self._handler(subscription, delivery, body)
        except CannotDecode as error:
            return await self._recover(delivery, tracing.failed(error))
        async with self._keys.turn(self._listen.key(body) if self._listen.key is not None else None):
            failure = tracing.failed(await self._try_locally(delivery, call))
        if self._listen.ack != "auto":
            if failure is not None and not isinstance(failure, ShuttingDown):
                log.error("handler_failed", queue=delivery.queue, error=repr(failure)[:300], ack=self._listen.ack)
            return None
        if failure is None:
            return None if delivery.settled else ack(delivery)
        return await self._after_failure(delivery, failure)

    def _handler(self, subscription: Subscription, delivery: Delivery, body: Any) -> Callable[[], Awaitable[None]]:
        kind = type(body)
        if kind in self._listen.effects:
            return lambda: self._group.submit(self._apply, (subscription, delivery, body))
        if kind in self._listen.plain:
            handler = self._listen.plain[kind]

            async def settle(settlement: Settlement) -> None:
                await subscription.settle([settlement])

            async def call() -> None:
                async with self._slots:
                    if self._stopping.is_set():
                        raise ShuttingDown("stopped before this message's turn")
                    if self._listen.ack == "none" and not await self._settle(subscription, ack(delivery)):
                        return  # it may come again, so nobody may have handled it
                    await self._in_time(handler(Incoming(body=body, delivery=delivery, settle=settle)))

            return call
        raise CannotDecode(f"listener {self._listen.name!r} has no handler for type {delivery.message.type!r}")

    async def _in_time(self, work: Awaitable[None]) -> None:
        if self._listen.time_limit_ms is None:
            await work
            return
        limit = asyncio.timeout(self._listen.time_limit_ms / 1_000)
        try:
            async with limit:
                await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise HandlerTimeout(f"not done within {self._listen.time_limit_ms} ms; it was cancelled") from error

    async def _carefully(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call, and count failures in a row; while everything fails, one at a time and slowly."""
        if self._outage.on:
            async with self._outage.one_at_a_time:
                if self._outage.on:
                    await self._counted(call)
                    return
        await self._counted(call)  # also who waited for his turn while the outage ended

    async def _counted(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except Exception as error:
            if not isinstance(error, (Retry, ShuttingDown)) and not is_fatal(error, self._listen.local.fatal):
                self._outage.failed()
                if self._outage.on:
                    log.warning("outage", listener=self._listen.name, failures_in_a_row=self._outage.failures)
                    await self._pause(self._outage.wait_s)
            raise
        self._outage.worked()

    async def _try_locally(self, delivery: Delivery, call: Callable[[], Awaitable[None]]) -> Exception | None:
        """Call until it succeeds or the local policy gives up; answers the last error."""
        attempt = 1
        while True:
            try:
                await self._carefully(call)
            except Exception as error:
                wait_ms = None
                if self._listen.ack == "auto" and not isinstance(error, (Retry, ShuttingDown)):
                    wait_ms = self._listen.local.delay_ms(attempt, error, self._chance)
                if wait_ms is None or self._stopping.is_set():
                    return error
                log.info(
                    "handler_failed_trying_again",
                    listener=self._listen.name,
                    message_id=delivery.message.message_id,
                    attempt=attempt,
                    error=repr(error)[:300],
                )
                attempt += 1
                await self._pause(wait_ms / 1_000)
            else:
                return None

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

    async def _apply(
        self, tx: Tx, requests: Sequence[tuple[Subscription, Delivery, Any]]
    ) -> list[HoldfastError | None]:
        """Decide a batch: claim in the inbox, run the effects by type, ack; all in `tx`."""
        message_ids = [delivery.message.message_id for _, delivery, _ in requests]
        fresh = await self._inbox.fresh(tx, self._listen.name, message_ids)
        bodies: dict[type, list[Any]] = {}
        for _, delivery, body in requests:
            tx.caused(body, tracing.trace_of(delivery))
            if delivery.message.message_id in fresh:
                fresh.discard(delivery.message.message_id)  # a second copy in this very batch is a duplicate
                bodies.setdefault(type(body), []).append(body)
        for kind, batch in bodies.items():
            await tracing.apply(self._listen.queue, self._listen.effects[kind], tx, batch)
        await requests[0][0].settle([ack(delivery) for _, delivery, _ in requests], tx)
        return [None for _ in requests]

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until the stop."""
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({timer, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            stop.cancel()
