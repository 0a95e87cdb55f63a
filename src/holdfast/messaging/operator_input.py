"""What an operator may ask of the error store: pure checks, before anything is read or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from holdfast.errors import InvalidInput
from holdfast.ids import ID_MAX
from holdfast.messaging.codec import BODY_BYTES_MAX
from holdfast.messaging.compression import expanded
from holdfast.messaging.message import HEADER_PARKED_ID, JSON

IDS_MAX = 1_000  # asked for one by one; more are a group
NAME_CHARS_MAX = 200
REASON_CHARS_MAX = 2_000
HEADERS_CHARS_MAX = 65_536
PER_SECOND_MIN, PER_SECOND_MAX = 0.001, 1_000_000.0


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Which messages an operator means: by ids, a group, a queue, or, when all three are None, everything."""

    ids: tuple[int, ...] | None
    group: str | None
    queue: str | None


def choose(ids: Sequence[int] | None, group: str | None, queue: str | None, everything: bool) -> Chosen:
    """Raises `InvalidInput` unless messages are named in exactly one way."""
    if (ids is not None) + (group is not None) + (queue is not None) + everything != 1:
        raise InvalidInput("name the messages in one way: ids, a group, a queue, or all")
    if ids is not None:
        if not 1 <= len(ids) <= IDS_MAX:
            raise InvalidInput(f"1 to {IDS_MAX} ids can be named at once, not {len(ids)}; use a group for more")
        for each in ids:
            check_id(each)
    check_filter(queue, group)
    return Chosen(ids=None if ids is None else tuple(ids), group=group, queue=queue)


def check_id(parked_id: int) -> None:
    """Raises `InvalidInput` for what cannot be the id of a row."""
    if not 0 <= parked_id <= ID_MAX:
        raise InvalidInput(f"{str(parked_id)[:40]} is no id of a parked message; `holdfast errors list` shows them")


def check_filter(queue: str | None, group: str | None) -> None:
    """Raises `InvalidInput` for a name that no queue or group can have."""
    for what, name in (("queue", queue), ("group", group)):
        if name is not None and (not name or not storable(name)):
            raise InvalidInput(f"no {what} can have the name {name[:NAME_CHARS_MAX]!r}")


def check_who(actor: str, reason: str, *, must_say_why: bool = False) -> dict[str, str]:
    """The actor and the reason as the audit keeps them; raises `InvalidInput`."""
    if not actor.strip() or len(actor) > NAME_CHARS_MAX or not storable(actor):
        raise InvalidInput(f"say who does this: an actor of 1 to {NAME_CHARS_MAX} characters, kept in the audit")
    if len(reason) > REASON_CHARS_MAX or not storable(reason):
        raise InvalidInput(f"a reason has at most {REASON_CHARS_MAX} characters, none of them NUL")
    if must_say_why and not reason.strip():
        raise InvalidInput("say why these messages are discarded; the reason is kept in the audit")
    return {"actor": actor, "reason": reason}


def step_us(per_second: float | None) -> float:
    """Microseconds between two replayed messages; raises `InvalidInput` for a rate out of range."""
    if per_second is None:
        return 0.0
    if not (math.isfinite(per_second) and PER_SECOND_MIN <= per_second <= PER_SECOND_MAX):
        raise InvalidInput(f"the rate must be {PER_SECOND_MIN} to {PER_SECOND_MAX:.0f} a second, not {per_second}")
    return 1_000_000 / per_second


def check_body(body: bytes, content_type: str, content_encoding: str | None = None) -> None:
    """Raises `InvalidInput` for a body over the limit, or that is not what the message's headers say it is."""
    if len(body) > BODY_BYTES_MAX:
        raise InvalidInput(f"a body of {len(body)} bytes is over the limit of {BODY_BYTES_MAX}")
    if content_encoding is not None:
        body = expanded(body, content_encoding, BODY_BYTES_MAX)
    if content_type != JSON:
        return
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Neither error's own words are told, but for the place: they may be words of the body.
        place = str(error).rpartition("(")[2].rstrip(")") if "(byte " in str(error) else "its end or its encoding"
        raise InvalidInput(f"the new body is no JSON, as the message's content type says; look at {place}") from None


def edited_headers(before: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The headers after the changes, None removing one; raises `InvalidInput` for those that cannot be."""
    after = dict(before)
    for name, value in changes.items():
        if not name or not storable(name) or len(name) > NAME_CHARS_MAX:
            raise InvalidInput(f"no header can have the name {name[:NAME_CHARS_MAX]!r}")
        if name == HEADER_PARKED_ID:
            raise InvalidInput(f"{HEADER_PARKED_ID} is set by the error store itself")
        if value is None:
            if name not in after:
                raise InvalidInput(
                    f"there is no header {name!r} to remove; it has: {', '.join(sorted(before)) or 'none'}"
                )
            del after[name]
        elif not storable(value):
            raise InvalidInput(f"the value of header {name!r} holds characters that cannot be stored")
        else:
            after[name] = value
    if sum(len(name) + len(value) for name, value in after.items()) > HEADERS_CHARS_MAX:
        raise InvalidInput(f"headers may have {HEADERS_CHARS_MAX} characters altogether")
    return after


def storable(text: str) -> bool:
    """Whether any database stores it: NUL and half a surrogate pair are refused by some."""
    return "\x00" not in text and not any("\ud800" <= each <= "\udfff" for each in text)
