"""Outbox: messages written in the caller's transaction.

Nothing is sent from a rolled-back transaction; everything committed is delivered at least once. Where the transport
shares the database the row written is already the queue's row, so there is nothing to relay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.ids import IdSource
from holdfast.messaging import tracing
from holdfast.messaging.codec import Codec
from holdfast.messaging.draft import Composer, Draft
from holdfast.messaging.transport import SharesDatabase


class Outbox:
    """Adds messages to a transaction, and takes pending ones out of it."""

    def __init__(self, transport: SharesDatabase, codec: Codec, clock: Clock, ids: IdSource) -> None:
        self._transport = transport
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
