"""What the tests of handlers share: bodies, a dependency, and a handler bound or refused alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
import pytest

from holdfast.clock import ManualClock
from holdfast.errors import InvalidInput
from holdfast.messaging.handlers import AckMode, Bound, bind
from holdfast.messaging.injection import Incoming
from holdfast.messaging.message import Delivery, Message, Settlement


class Placed(msgspec.Struct, frozen=True):
    """A body."""

    number: int


@dataclass(frozen=True)
class Closed:
    """A body of another kind."""

    number: int


class Paid(pydantic.BaseModel):
    """A body of a third kind."""

    number: int


class Mailer:
    """A dependency; what it does is noted."""

    def __init__(self) -> None:
        self.sent: list[Any] = []


CLOCK = ManualClock()
TX: Any = object()
LISTENER = "welcome"


async def settle(settlement: Settlement) -> None:
    settlement.delivery.mark_settled()


def incoming(body: Any) -> Incoming[Any]:
    message = Message(exchange="e", routing_key="k", body=b"", message_id=f"id of {body}", timestamp_us=0)
    delivery = Delivery(message=message, queue="q", attempt=1, deliveries=1, receipt=None)
    return Incoming(body=body, delivery=delivery, settle=settle)


def bound(
    handler: Callable[..., Awaitable[Any]], provide: Mapping[Any, Any] | None = None, ack: AckMode = "auto"
) -> Bound:
    """A single handler, bound for the first class of its body."""
    return next(iter(bind(LISTENER, [handler], provide or {}, CLOCK, ack=ack).values()))


def refused(
    handler: Callable[..., Awaitable[Any]], provide: Mapping[Any, Any] | None = None, ack: AckMode = "auto"
) -> str:
    with pytest.raises(InvalidInput) as caught:
        bound(handler, provide, ack)
    return caught.value.detail
