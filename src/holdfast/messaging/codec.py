"""Typed bodies: a message's `type` names the struct its JSON is decoded into; nothing else is built from a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.errors import CannotDecode, HoldfastError, InvalidInput
from holdfast.messaging.message import JSON, Message

BODY_BYTES_MAX = 16 * 1024 * 1024


class Codec:
    """Encodes registered structs as JSON and decodes them strictly by type id."""

    def __init__(self, types: Mapping[str, type[msgspec.Struct]]) -> None:
        self._types = dict(types)
        self._names = {kind: name for name, kind in self._types.items()}
        self._decoders = {name: msgspec.json.Decoder(kind) for name, kind in self._types.items()}
        self._encoder = msgspec.json.Encoder()

    def encode(self, body: msgspec.Struct) -> tuple[str, bytes]:
        """Answers (type id, JSON); raises `InvalidInput` for a type that is not registered."""
        name = self._names.get(type(body))
        if name is None:
            raise InvalidInput(f"{type(body).__name__} has no type id; add it to the codec's types")
        return name, self._encoder.encode(body)

    def decode(self, message: Message) -> Any:
        """Decode by the message's type id.

        Raises `CannotDecode` for an unknown type, another content type, an oversize body or a wrong shape; the text
        names the place and never repeats the body.
        """
        decoder = self._decoders.get(message.type)
        if decoder is None:
            raise CannotDecode(f"unknown message type {message.type[:80]!r}; known: {', '.join(sorted(self._types))}")
        if message.content_type != JSON:
            raise CannotDecode(f"content type {message.content_type[:80]!r} is not {JSON}")
        if len(message.body) > BODY_BYTES_MAX:
            raise CannotDecode(f"a body of {len(message.body)} bytes is over the limit of {BODY_BYTES_MAX}")
        try:
            return decoder.decode(message.body)
        except Exception as error:  # a struct's own __post_init__ may raise anything, and another try cannot mend it
            raise CannotDecode(f"the body is no {message.type}: {_fault(error)}") from None


def _fault(error: Exception) -> str:
    """What is wrong and where, without a word of the body: msgspec quotes values of these two faults."""
    told = str(error)
    where = told[told.rindex(" - at ") :] if " - at " in told else ""
    if not isinstance(error, (msgspec.DecodeError, RecursionError, UnicodeDecodeError)):
        # A rule of ours says what it wants; what another error quotes may be the body.
        said = f": {error.detail}" if isinstance(error, HoldfastError) else ""
        return f"its own rule refuses it ({type(error).__name__}){said}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if told.startswith("Invalid enum value"):
        return f"Invalid enum value{where}"
    if told.startswith("Object contains unknown field"):
        return f"Object contains an unknown field{where}"
    return told
