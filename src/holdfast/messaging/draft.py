"""Draft: a typed body with its address, made into the message that travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.clock import Clock
from holdfast.errors import InvalidInput
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.message import Message, Outgoing

DELAY_MS_MAX = 100 * 366 * 86_400_000
OWN_HEADERS_PREFIX = "x-holdfast-"


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """One message to be sent: a typed body with its address and, if wanted, its delay.

    `delay_ms` counts from now. `due_us` is an instant instead, for deadlines that are stored elsewhere too. A message
    that waits longer than `expires_ms` in a queue, from when it is due, expires.
    """

    exchange: str
    routing_key: str
    body: Any
    delay_ms: int = 0
    due_us: int | None = None
    expires_ms: int | None = None
    headers: Mapping[str, str] = {}
    mandatory: bool = True
    cancel_key: str | None = None
    message_id: str | None = None
    trace: Mapping[str, str] = {}  # of what caused it (`Tx.trace_of`); the running trace when empty


def until(due_us: int, now_us: int) -> int:
    """The delay in milliseconds to an instant, rounded up: never early; 0 to one that has passed."""
    return max(0, -(-(due_us - now_us) // 1_000))


def refuse_bad_delay(delay_ms: int) -> None:
    """Raise `InvalidInput` for a delay below zero or above a century."""
    if not 0 <= delay_ms <= DELAY_MS_MAX:
        raise InvalidInput(f"delay_ms must be in 0..{DELAY_MS_MAX}, not {delay_ms}")


class Composer:
    """Makes messages of drafts."""

    def __init__(self, codec: Codec, clock: Clock, ids: IdSource) -> None:
        self._codec = codec
        self._clock = clock
        self._ids = ids

    def outgoing(self, draft: Draft, trace: Mapping[str, str]) -> Outgoing:
        """The message as it is sent; `trace` is of the running task, a draft's own comes first.

        Raises `InvalidInput` for a body that cannot be encoded, for a delay or expiry below zero or above a century,
        and for a header that is ours to write.
        """
        now_us = self._clock.now_us()
        delay_ms = draft.delay_ms if draft.due_us is None else until(draft.due_us, now_us)
        refuse_bad_delay(delay_ms)
        if draft.expires_ms is not None and not 0 <= draft.expires_ms <= DELAY_MS_MAX:
            raise InvalidInput(f"expires_ms must be in 0..{DELAY_MS_MAX}, not {draft.expires_ms}")
        properties, encoded = self._codec.encode(draft.body)
        headers = draft.trace or trace
        if draft.headers or properties.headers:
            headers = {**headers, **_checked(draft.headers), **properties.headers}
        message = Message(
            exchange=draft.exchange,
            routing_key=draft.routing_key,
            body=encoded,
            message_id=draft.message_id or self._ids.message_id(),
            timestamp_us=now_us,
            type=properties.type,
            content_type=properties.content_type,
            headers=headers,
        )
        return Outgoing(
            message=message,
            delay_ms=delay_ms,
            expires_ms=draft.expires_ms,
            mandatory=draft.mandatory,
            cancel_key=draft.cancel_key,
        )


def _checked(headers: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidInput(f"header {str(name)[:80]!r}: names and values of headers are text; convert it first")
        if name.startswith(OWN_HEADERS_PREFIX):
            raise InvalidInput(f"header {name[:80]!r}: names that begin with {OWN_HEADERS_PREFIX} are ours to write")
    return headers
