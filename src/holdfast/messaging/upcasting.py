"""Upcasting: a message of an older version is brought to the newest one before it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from holdfast.errors import CannotDecode, HoldfastError, InvalidInput
from holdfast.messaging.bodies import Read, fault, write_fault, write_finite

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
Upcasters = Mapping[str, tuple[str, Upcaster]]

_read_object = msgspec.json.Decoder(dict[str, Any]).decode


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """The way of an old version: the steps in order, each with the type id it leads to, and where they end."""

    target: str
    steps: tuple[tuple[str, Upcaster], ...]


def chains(upcasters: Upcasters, types: Collection[str]) -> dict[str, Chain]:
    """Follow every upcaster to its end.

    Raises `InvalidInput` for a circle, for an end that is not in `types` and for a step that is no function.
    """
    found = {}
    for source in upcasters:
        seen, steps, at = [source], [], source
        while at in upcasters:
            at, function = upcasters[at]
            if not callable(function):
                raise InvalidInput(f"the upcaster {seen[-1]} -> {at} is no function")
            if at in seen:
                raise InvalidInput(f"upcasters go in a circle: {' -> '.join([*seen, at])}")
            seen.append(at)
            steps.append((at, function))
        if at not in types:
            raise InvalidInput(f"upcasters {' -> '.join(seen)} end at a type that is not registered: {at}")
        found[source] = Chain(target=at, steps=tuple(steps))
    return found


def upcasting(chain: Chain, read: Read) -> Read:
    """A reader of the old version: JSON object -> each step -> JSON -> `read`, the reader of the chain's target.

    The last turn through JSON gives old and new messages one and the same strict decoding.
    """

    def read_old(body: bytes) -> Any:
        found = _read_object(body)
        for to, function in chain.steps:
            try:
                found = function(found)
            except Exception as error:  # its text may quote the body, unless it is a rule of ours
                said = f": {error.detail}" if isinstance(error, HoldfastError) else ""
                raise CannotDecode(f"the upcaster to {to} raised {type(error).__name__}{said}") from None
            if type(found) is not dict:
                raise CannotDecode(f"the upcaster to {to} answered {type(found).__name__} instead of a dict")
        try:
            written = write_finite(found)
        except Exception as error:
            raise CannotDecode(f"the upcaster to {to} answered no JSON: {write_fault(error)}") from None
        try:
            return read(written)
        except Exception as error:
            raise CannotDecode(f"upcast to {chain.target}: {fault(error)}") from None

    return read_old
