"""Outbox: messages written in the caller's transaction.

Nothing is sent from a rolled-back transaction; everything committed is delivered at least once. Where the transport
shares the database the row written is already the queue's row, so there is nothing to relay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Tx
from holdfast.ids import IdSource
from holdfast.messaging import tracing
from holdfast.messaging.codec import Codec
from holdfast.messaging.draft import Composer, Draft, refuse_bad_delay, until
from holdfast.messaging.transport import SharesDatabase


class Outbox:
    """Adds messages to a transaction, and takes pending ones out of it."""

    def __init__(self, transport: SharesDatabase, codec: Codec, clock: Clock, ids: IdSource) -> None:
        self._transport = transport
        self._clock = clock
        self._composer = Composer(codec, clock, ids)

    async def add(
        self,
        tx: Tx,
        exchange: str,
        routing_key: str,
        body: Any,
        *,
        delay_ms: int = 0,
        expires_ms: int | None = None,
        headers: Mapping[str, str] | None = None,
        mandatory: bool = True,
        cancel_key: str | None = None,
    ) -> None:
        """Add one message; see `add_all`."""
        draft = Draft(
            exchange=exchange,
            routing_key=routing_key,
            body=body,
            delay_ms=delay_ms,
            expires_ms=expires_ms,
            headers=headers or {},
            mandatory=mandatory,
            cancel_key=cancel_key,
        )
        await self.add_all(tx, [draft])

    async def add_all(self, tx: Tx, drafts: Sequence[Draft]) -> None:
        """Add messages within `tx`; they exist if and only if it commits.

        Raises `Unroutable` for a mandatory message that no queue takes, `PublishRejected` for an unknown exchange and
        `InvalidInput` for a delay below zero or above a century; the transaction is then to be left.
        """
        if not drafts:
            return
        with tracing.sending(drafts, self._composer.outgoing) as sending:
            for problem in await self._transport.publish_in(tx, sending.batch):
                if problem is not None:
                    raise problem

    async def cancel(self, tx: Tx, *cancel_keys: str) -> int:
        """Remove pending messages by key within `tx`; answers how many. One already delivered is not called back."""
        return await self._transport.cancel_in(tx, cancel_keys) if cancel_keys else 0

    async def move(self, tx: Tx, *cancel_keys: str, delay_ms: int = 0, due_us: int | None = None) -> int:
        """Let pending messages be due at another instant within `tx`, sooner or later; answers how many were moved.

        `delay_ms` counts from now, `due_us` is an instant instead, as in a `Draft`; how long a message may wait in its
        queue counts from there. One that was delivered before is not moved: it is being handled, or on its retries.
        Raises `InvalidInput` for a delay below zero or above a century.
        """
        now_us = self._clock.now_us()
        wait_ms = delay_ms if due_us is None else until(due_us, now_us)
        refuse_bad_delay(wait_ms)
        if not cancel_keys:
            return 0
        return await self._transport.move_in(tx, cancel_keys, now_us + wait_ms * US_PER_MS)
