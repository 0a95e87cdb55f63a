"""What the outside is told of: the facts of the event feed, and an event as the feed and its followers know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Union

import msgspec

from holdfast.services.contracts.events import (
    TYPES,
    Event,
    OrderClosed,
    OrderCompleted,
    OrderCreated,
    OrderPaid,
    OrderRefunded,
    OrderShipped,
    PaymentSucceeded,
)

FACTS: Mapping[type[Event], tuple[str, ...]] = {
    OrderCreated: ("order_id",),
    OrderPaid: ("order_id",),
    OrderShipped: ("order_id",),
    OrderCompleted: ("order_id",),
    OrderRefunded: ("order_id",),
    OrderClosed: ("order_id",),
    PaymentSucceeded: ("payment_id",),
}
"""Which messages are told, and the fields that tell one from another of its type: the same again is told once."""

if TYPE_CHECKING:
    Fact = Event
else:
    Fact = Union[tuple(FACTS)]  # noqa: UP007  # of as many as there are

_IDS = {kind: type_id for type_id, kind in TYPES.items()}
FACT_TYPES: tuple[str, ...] = tuple(_IDS[kind] for kind in FACTS)
"""The type ids of the feed."""


def type_id(fact: Event) -> str:
    """The type id of a fact."""
    return _IDS[type(fact)]


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the feed. `data` is JSON: ids are strings, times RFC 3339, names in camelCase."""

    id: int
    type: str
    owner: str | None  # the buyer whose event it is; None: for staff alone
    at_us: int
    data: str
