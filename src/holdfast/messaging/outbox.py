"""Outbox: messages written in the caller's transaction.

Nothing is sent from a rolled-back transaction; everything committed is delivered at least once. Where the transport
shares the database the row written is already the queue's row, so there is nothing to relay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec, travelling
from holdfast.messaging.message import Message, Outgoing
from holdfast.messaging.transport import SharesDatabase

DELAY_MS_MAX = 100 * 366 * 86_400_000


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """One message to be added: a typed body with its address and, if wanted, its delay.

    `delay_ms` counts from now. `due_us` is an instant instead, for deadlines that are stored elsewhere too.
    """

    exchange: str
    routing_key: str
    body: Any  # of a class that the codec knows
    delay_ms: int = 0
    due_us: int | None = None
    mandatory: bool = True
    cancel_key: str | None = None
    message_id: str | None = None
    trace: Mapping[str, str] = {}  # of what caused it (`Tx.trace_of`); the running trace when empty


class Outbox:
    """Adds messages to a transaction, and takes pending ones out of it."""

    def __init__(self, transport: SharesDatabase, codec: Codec, clock: Clock, ids: IdSource) -> None:
        self._transport = transport
        self._codec = codec
        self._clock = clock
        self._ids = ids

    async def add(
        self,
        tx: Tx,
        exchange: str,
        routing_key: str,
        body: Any,
        *,
        delay_ms: int = 0,
        mandatory: bool = True,
        cancel_key: str | None = None,
    ) -> None:
        """Add one message; see `add_all`."""
        draft = Draft(
            exchange=exchange,
            routing_key=routing_key,
            body=body,
            delay_ms=delay_ms,
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
        trace = observe.trace_headers()  # of the running task; a draft's own comes first
        for problem in await self._transport.publish_in(tx, [self._outgoing(draft, trace) for draft in drafts]):
            if problem is not None:
                raise problem

    async def cancel(self, tx: Tx, *cancel_keys: str) -> int:
        """Remove pending messages by key within `tx`; answers how many. One already delivered is not called back."""
        return await self._transport.cancel_in(tx, cancel_keys) if cancel_keys else 0

    def _outgoing(self, draft: Draft, trace: Mapping[str, str]) -> Outgoing:
        now_us = self._clock.now_us()
        delay_ms = draft.delay_ms
        if draft.due_us is not None:
            delay_ms = max(0, -(-(draft.due_us - now_us) // 1_000))  # rounded up: never early
        if not 0 <= delay_ms <= DELAY_MS_MAX:
            raise InvalidInput(f"delay_ms must be in 0..{DELAY_MS_MAX}, not {delay_ms}")
        properties, encoded = self._codec.encode(draft.body)
        headers = travelling(draft.trace) if draft.trace else trace
        message = Message(
            exchange=draft.exchange,
            routing_key=draft.routing_key,
            body=encoded,
            message_id=draft.message_id or self._ids.message_id(),
            timestamp_us=now_us,
            type=properties.type,
            content_type=properties.content_type,
            headers={**headers, **properties.headers} if properties.headers else headers,
        )
        return Outgoing(message=message, delay_ms=delay_ms, mandatory=draft.mandatory, cancel_key=draft.cancel_key)
