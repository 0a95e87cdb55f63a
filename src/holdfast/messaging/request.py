"""Request and reply over queues: ask, and wait for the answer until a deadline."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from holdfast import observe
from holdfast.clock import Clock
from holdfast.errors import HoldfastError, InvalidInput, ReplyTimeout, ShuttingDown
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.injection import Incoming
from holdfast.messaging.message import Delivery, ack
from holdfast.messaging.publisher import DEADLINE_S, Publisher
from holdfast.messaging.topology import Queue, Topology
from holdfast.messaging.transport import Subscription, Transport

HEADER_REPLY_TO = "reply-to"
HEADER_CORRELATION = "correlation-id"
PREFETCH = 100
AWAY_S = 1.0

log = observe.logger("request")


class Requester:
    """Sends requests and hands each reply to who asked; one for a program is enough.

    Replies come to a queue of this instance alone, so they are lost with it, as are the questions that waited.
    """

    def __init__(self, transport: Transport, publisher: Publisher, codec: Codec, clock: Clock, ids: IdSource) -> None:
        self._transport = transport
        self._publisher = publisher
        self._codec = codec
        self._clock = clock
        self._ids = ids
        self._queue = Queue.anonymous("replies")
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Requester:
        await self._transport.declare(Topology(queues=[self._queue]))
        self._subscription = self._transport.subscribe(self._queue.name, prefetch=PREFETCH)
        await self._subscription.__aenter__()
        self._task = asyncio.create_task(self._run(self._subscription), name="replies")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; who still waits gets `ShuttingDown`."""
        assert self._subscription is not None
        assert self._task is not None
        self._subscription.stop()
        await asyncio.wait([self._task])
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(ShuttingDown("this process stopped before the reply came"))
        await self._subscription.__aexit__(kind, error, trace)

    async def ask(self, exchange: str, routing_key: str, body: Any, *, deadline_s: float = DEADLINE_S) -> Any:
        """Send a request and return the body of its reply.

        Raises `ReplyTimeout` when none came within `deadline_s`: the request may or may not have been handled; nobody
        begins to handle it after the deadline. Raises what `Publisher.publish` raises when it was not sent.
        """
        correlation = self._ids.message_id()
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = reply
        headers = {HEADER_REPLY_TO: self._queue.name, HEADER_CORRELATION: correlation}
        expires_ms = max(1, round(deadline_s * 1_000))
        try:
            async with asyncio.timeout(deadline_s) as limit:
                await self._publisher.publish(
                    exchange, routing_key, body, headers=headers, expires_ms=expires_ms, deadline_s=deadline_s
                )
                return await reply
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ReplyTimeout(f"no reply within {deadline_s} s; the request may or may not be handled") from error
        finally:
            del self._waiting[correlation]

    async def _run(self, subscription: Subscription) -> None:
        while True:
            try:
                deliveries = await subscription.take()
                if not deliveries:
                    return
                for delivery in deliveries:
                    self._hand_over(delivery)
                await subscription.settle([ack(delivery) for delivery in deliveries])
            except ShuttingDown:
                return
            except HoldfastError as error:
                log.warning("replies_unavailable", error=error.code, detail=error.detail)
                await self._clock.sleep(AWAY_S)

    def _hand_over(self, delivery: Delivery) -> None:
        waiter = self._waiting.get(delivery.message.headers.get(HEADER_CORRELATION, ""))
        if waiter is None or waiter.done():
            log.info("reply_for_nobody", message_id=delivery.message.message_id)  # late, or a second one
            return
        try:
            waiter.set_result(self._codec.decode(delivery.message))
        except HoldfastError as error:
            waiter.set_exception(error)


async def reply(publisher: Publisher, incoming: Incoming, body: Any) -> None:
    """Answer a request; one that nobody waits for any more is dropped.

    Raises `InvalidInput` for a message that is no request.
    """
    headers = incoming.delivery.message.headers
    queue, correlation = headers.get(HEADER_REPLY_TO), headers.get(HEADER_CORRELATION)
    if not queue or not correlation:
        raise InvalidInput(f"this message is no request: it lacks {HEADER_REPLY_TO} or {HEADER_CORRELATION}")
    await publisher.publish("", queue, body, headers={HEADER_CORRELATION: correlation}, mandatory=False)
