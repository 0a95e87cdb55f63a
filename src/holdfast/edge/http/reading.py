"""What is read from a request: its idempotency key and its body, or the sender is told what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from holdfast.edge.http.problems import PreconditionRequired
from holdfast.errors import InvalidInput
from holdfast.services.orders.model import IdempotencyKey

T = TypeVar("T")

_TAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e]*)"\s*(,|$)')
ID_MAX = 2**63 - 1
_ID = re.compile(r"[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"[0-9]{1,6}")


def body_of(kind: type[T]) -> Callable[[bytes], T]:
    """A strict reader of JSON bodies; it raises `InvalidInput` for whatever is no such body, however odd."""
    decode = msgspec.json.Decoder(kind).decode

    def read(raw: bytes) -> T:
        try:
            return decode(raw)
        except msgspec.DecodeError as error:
            raise InvalidInput(f"the body is wrong: {error}") from None
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the body is wrong: not UTF-8 at byte {error.start}") from None
        except RecursionError:
            raise InvalidInput("the body is wrong: nested too deeply") from None

    return read


def idempotency_key(headers: Mapping[str, str]) -> str:
    """The header Idempotency-Key: 1 to 128 visible ASCII characters; raises `InvalidInput`."""
    try:
        key: str = msgspec.convert(headers.get("idempotency-key", ""), IdempotencyKey)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"the header Idempotency-Key is missing or wrong: {error}") from None
    return key


def if_match(headers: Mapping[str, str]) -> frozenset[str] | None:
    """The header If-Match: the tags that will do, None for any (`*`), compared strongly, so weak ones never fit.

    Raises `PreconditionRequired` without one, `InvalidInput` for what is no list of entity tags.
    """
    given = headers.get("if-match")
    if given is None:
        raise PreconditionRequired()
    if given.strip() == "*":
        return None
    tags: set[str] = set()
    at, more = 0, True
    while more:
        tag = _TAG.match(given, at)
        if tag is None:
            raise InvalidInput('the header If-Match is wrong: send an ETag as it came, such as "7", or *')
        if not tag[1]:
            tags.add(tag[2])
        at, more = tag.end(), tag[3] == ","
    return frozenset(tags)


def row_id(text: str) -> int | None:
    """An id as it stands in paths and bodies; None for what is no id, which names nothing."""
    return int(text) if _ID.fullmatch(text) and int(text) <= ID_MAX else None


def wanted_id(name: str, text: str | None) -> int | None:
    """An id that a body or query may name; raises `InvalidInput` for what is no id."""
    if text is None:
        return None
    found = row_id(text)
    if found is None:
        raise InvalidInput(f"{name} is no id; ids are written as they were given out")
    return found


def page_of(query: Mapping[str, str], limit_max: int) -> tuple[int, int]:
    """(after, limit) of a list: the page behind the id `after`, 50 long if not said; raises `InvalidInput`."""
    after = query.get("after", "0")
    limit = query.get("limit", str(min(50, limit_max)))
    if not _NUMBER.fullmatch(limit) or not 1 <= int(limit) <= limit_max:
        raise InvalidInput(f"limit is a number in 1..{limit_max}")
    return (0 if after == "0" else wanted_id("after", after) or 0), int(limit)
