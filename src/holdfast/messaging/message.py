"""Message (what is sent) and Delivery (one handing-over of it, settled once)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from holdfast.errors import AlreadySettled

HEADER_TRACEPARENT = "traceparent"
HEADER_PARKED_ID = "x-holdfast-parked-id"  # on a message that was replayed: the row of the error store it came from
JSON = "application/json"


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message as it travels: bytes with an address and properties, named as in AMQP."""

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    timestamp_us: int
    type: str = ""
    content_type: str = JSON
    headers: Mapping[str, str] = {}


class Outgoing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A message with how it is to be sent."""

    message: Message
    delay_ms: int = 0
    expires_ms: int | None = None  # how long it may wait in a queue, from when it is due
    mandatory: bool = True  # no queue for it is an error, not a silent loss
    cancel_key: str | None = None  # a pending delayed message can be removed by this key


class Delivery:
    """One handing-over of a message to this process; to be settled exactly once.

    `attempt` counts from 1 and grows with every durable retry; it is stored with the message and survives a crash.
    `deliveries` counts every handing-over, also those that ended in a crash. `receipt` belongs to the transport,
    `trace` to the listener: the headers that carry the span it is handled in, empty without one.
    """

    __slots__ = ("_settled", "attempt", "deliveries", "message", "queue", "receipt", "trace")

    def __init__(self, *, message: Message, queue: str, attempt: int, deliveries: int, receipt: Any) -> None:
        self.message = message
        self.queue = queue
        self.attempt = attempt
        self.deliveries = deliveries
        self.receipt = receipt
        self.trace: Mapping[str, str] = {}
        self._settled = False

    @property
    def settled(self) -> bool:
        """Whether ack, retry or reject was committed."""
        return self._settled

    def mark_settled(self) -> None:
        """Called by the transport once the settlement is certain; raises `AlreadySettled` the second time."""
        if self._settled:
            raise AlreadySettled(f"message {self.message.message_id} from {self.queue} was settled before")
        self._settled = True


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a delivery.

    `ack` removes it; `retry` puts it back into its queue, to be delivered again after `after_ms` with its attempt
    raised by one if it `counts`; `reject` sends it to its dead-letter exchange, or parks it where there is none;
    `park` takes it out of the queue into the error store, with the reason.
    """

    delivery: Delivery
    kind: Literal["ack", "retry", "reject", "park"]
    after_ms: int = 0
    counts: bool = True  # whether a retry raises the attempt
    reason: str = ""


def ack(delivery: Delivery) -> Settlement:
    """The delivery is done with."""
    return Settlement(delivery=delivery, kind="ack")


def retry(delivery: Delivery, after_ms: int, *, counts: bool = True, reason: str = "") -> Settlement:
    """Deliver it again, not before `after_ms` milliseconds from now."""
    return Settlement(delivery=delivery, kind="retry", after_ms=after_ms, counts=counts, reason=reason)


def reject(delivery: Delivery, reason: str) -> Settlement:
    """Hand it to its queue's dead-letter exchange; where there is none, it is parked."""
    return Settlement(delivery=delivery, kind="reject", reason=reason)


def handed_on(headers: Mapping[str, str]) -> Mapping[str, str]:
    """The headers as what the message causes may carry them: the mark of a replay belongs to the replay alone."""
    if HEADER_PARKED_ID not in headers:
        return headers
    return {name: value for name, value in headers.items() if name != HEADER_PARKED_ID}


def park(delivery: Delivery, reason: str) -> Settlement:
    """Give up on it and keep it where a human finds it."""
    return Settlement(delivery=delivery, kind="park", reason=reason)
