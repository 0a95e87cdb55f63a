"""Publisher: encode, send, wait for the confirm, and never call a lost message delivered."""

from __future__ import annotations

import asyncio
import random

import msgspec

from holdfast import observe
from holdfast.clock import Clock
from holdfast.errors import InvalidInput, PublishRejected, PublishUnconfirmed
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.message import Message, Outgoing
from holdfast.messaging.outbox import DELAY_MS_MAX
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.transport import Transport

DEADLINE_S = 10.0


class Publisher:
    """Sends typed messages outside of any transaction; within one, use the outbox."""

    def __init__(
        self, transport: Transport, codec: Codec, clock: Clock, ids: IdSource, retry: RetryPolicy | None = None
    ) -> None:
        self._transport = transport
        self._codec = codec
        self._clock = clock
        self._ids = ids
        self._retry = retry or RetryPolicy(tries=3, interval_ms=1_000)
        self._chance = random.Random()  # noqa: S311  # jitter

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: msgspec.Struct,
        *,
        delay_ms: int = 0,
        mandatory: bool = True,
        message_id: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> str:
        """Send one message and return its id once it is stored.

        A message known not to be stored is tried again (3 times, 1 s apart, by default), all tries within `deadline_s`.
        Raises `Unroutable`, `PublishRejected` (not stored) or `PublishUnconfirmed` (unknown: publish again with the
        same `message_id`, and the inbox drops the copy).
        """
        if not 0 <= delay_ms <= DELAY_MS_MAX:
            raise InvalidInput(f"delay_ms must be in 0..{DELAY_MS_MAX}, not {delay_ms}")
        type_id, encoded = self._codec.encode(body)
        message = Message(
            exchange=exchange,
            routing_key=routing_key,
            body=encoded,
            message_id=message_id or self._ids.message_id(),
            timestamp_us=self._clock.now_us(),
            type=type_id,
            headers=observe.trace_headers(),
        )
        try:
            async with asyncio.timeout(deadline_s):
                await self._send(Outgoing(message=message, delay_ms=delay_ms, mandatory=mandatory))
        except TimeoutError as error:
            raise PublishUnconfirmed(f"no confirm within {deadline_s} s; it may or may not be stored") from error
        return message.message_id

    async def _send(self, outgoing: Outgoing) -> None:
        attempt = 1
        while True:
            (problem,) = await self._transport.publish([outgoing])
            if problem is None:
                return
            wait_ms = self._retry.delay_ms(attempt, problem, self._chance)
            if wait_ms is None or not isinstance(problem, PublishRejected) or not problem.retryable:
                raise problem
            attempt += 1
            await self._clock.sleep(wait_ms / 1_000)
