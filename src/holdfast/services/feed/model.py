"""Feed's rules: what an event looks like to the outside, which wish to read is a good one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from holdfast.clock import rfc3339
from holdfast.errors import InvalidInput, Refused
from holdfast.services.contracts.events import Event
from holdfast.services.contracts.feed import FACT_TYPES, FACTS, type_id

LIMIT_MAX = 500


class EventsExpired(Refused):
    """Events after this one were removed already; start again from the oldest kept, without `after`."""

    code = "events_expired"


class EventView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An event as it is told."""

    id: str
    type: str
    timestamp: str
    data: dict[str, Any]


class EventPage(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Events in order of their ids, and the id to ask after next time; there is more at once if `more`."""

    events: list[EventView]
    next: str
    more: bool


def business_key(fact: Event) -> str:
    """What a fact is known by, however often its message is sent."""
    return ":".join([type_id(fact), *(str(getattr(fact, name)) for name in FACTS[type(fact)])])


def told(fact: msgspec.Struct) -> dict[str, Any]:
    """The fields of a fact as the HTTP API writes them: `order_id` a string, `pay_by_us` the time `payBy`."""
    found = {}
    for field in msgspec.structs.fields(fact):
        value = getattr(fact, field.name)
        name = field.encode_name
        if value is not None and field.name.endswith("_us"):
            name, value = name.removesuffix("Us"), rfc3339(value)
        elif value is not None and field.name.endswith("_id"):
            value = str(value) if value else None  # 0: there is none, as of a payment for what cost nothing
        elif isinstance(value, tuple):
            value = [told(each) if isinstance(each, msgspec.Struct) else each for each in value]
        elif isinstance(value, msgspec.Struct):
            value = told(value)
        found[name] = value
    return found


def check_types(types: Sequence[str]) -> None:
    """Raise `InvalidInput` for a type that no event has."""
    if unknown := [each for each in types if each not in FACT_TYPES]:
        raise InvalidInput(f"there are no events of type {unknown[0][:80]!r}; there are: {', '.join(FACT_TYPES)}")


def check_limit(limit: int) -> None:
    """Raise `InvalidInput` for a page that is empty or too long."""
    if not 1 <= limit <= LIMIT_MAX:
        raise InvalidInput(f"limit must be in 1..{LIMIT_MAX}, not {limit}")
