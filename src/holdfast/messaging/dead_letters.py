"""The history of a dead-lettered message, as RabbitMQ writes it, and its rule against endless circles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from holdfast.clock import US_PER_S

Reason = Literal["rejected", "expired", "maxlen"]

HEADER_DEATHS = "x-death"


class Death(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """How often a message died in a queue for a reason, and where it had been published to."""

    queue: str
    reason: Reason
    count: int
    exchange: str
    routing_keys: tuple[str, ...]
    time: int  # of the first time, in seconds since 1970


_decode = msgspec.json.Decoder(list[Death]).decode


def deaths(headers: Mapping[str, str]) -> list[Death]:
    """The history in a message's headers, newest first; one that is not ours to read counts as none."""
    try:
        return _decode(headers.get(HEADER_DEATHS, "[]"))
    except msgspec.MsgspecError:
        return []


def with_death(
    headers: Mapping[str, str], *, queue: str, reason: Reason, exchange: str, routing_key: str, now_us: int
) -> dict[str, str]:
    """The dead letter's headers: one entry for each (queue, reason), the latest first, and the first death."""
    known = deaths(headers)
    same = next((each for each in known if (each.queue, each.reason) == (queue, reason)), None)
    if same is None:
        same = Death(
            queue=queue,
            reason=reason,
            count=0,
            exchange=exchange,
            routing_keys=(routing_key,),
            time=now_us // US_PER_S,
        )
    others = [each for each in known if each is not same]
    newest = msgspec.structs.replace(same, count=same.count + 1)
    first = {
        "x-first-death-queue": queue,
        "x-first-death-reason": reason,
        "x-first-death-exchange": exchange,
    }
    return first | dict(headers) | {HEADER_DEATHS: msgspec.json.encode([newest, *others]).decode()}


def goes_in_circles(history: Sequence[Death], queue: str) -> bool:
    """Whether the message was in `queue` before and came back with no consumer's rejection on its way.

    RabbitMQ drops such a message at that queue, since nothing but the topology would ever move it
    (https://www.rabbitmq.com/docs/dlx).
    """
    for at, each in enumerate(history):
        if each.queue == queue:
            return all(death.reason != "rejected" for death in history[: at + 1])
    return False
