"""Typed bodies: a message's `type` names the class its JSON is decoded into; nothing else is built from a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.errors import CannotDecode, InvalidInput
from holdfast.messaging import compression
from holdfast.messaging.bodies import Read, Write, fault, kind_of, write_fault
from holdfast.messaging.compression import CONTENT_ENCODING, Algorithm
from holdfast.messaging.message import JSON, Message
from holdfast.messaging.upcasting import Upcasters, chains, upcasting

BODY_BYTES_MAX = 16 * 1024 * 1024
COMPRESS_OVER = 1024  # below it, the container costs what the compression gains

JAVA_TYPE = "__TypeId__"
"""Headers that describe one body and must not travel on to another message."""

ASSUMED_JSON = frozenset({JSON, "application/octet-stream", ""})  # Spring too takes a body without a type for JSON
UTF_8 = frozenset({"utf-8", "utf8", "us-ascii"})


class Properties(msgspec.Struct, frozen=True):
    """What a message says of its body."""

    type: str
    content_type: str = JSON
    headers: Mapping[str, str] = {}


class Codec:
    """Encodes bodies of registered classes as JSON and decodes them strictly by type id.

    `types` maps each type id to its class: a msgspec struct, a dataclass, a pydantic model, or one of `dict`, `list`,
    `str`, `int`, `float`, `bool`, `type(None)`. A class with several ids is written under the last one.

    `java` maps names of Java classes to registered classes: they are written as the header `__TypeId__`, and decide
    when a message's `type` is empty or unknown. `upcasters` maps the id of an old version to the id it leads to and a
    function on the JSON object, `{"order.v1": ("order.v2", function)}`; chains are followed. Bodies of more than
    `compress_over` bytes are compressed with `compress`, "gzip" or "zstd".

    Raises `InvalidInput` for a class that cannot be a body, a Java name of an unregistered class, upcasters that go in
    a circle or end nowhere, and a compression that is not installed.
    """

    def __init__(
        self,
        types: Mapping[str, type],
        *,
        java: Mapping[str, type] | None = None,
        upcasters: Upcasters | None = None,
        compress: Algorithm | None = None,
        compress_over: int = COMPRESS_OVER,
    ) -> None:
        if compress is not None:
            compression.require(compress)
        if compress_over < 0:
            raise InvalidInput(f"compress_over is a number of bytes, not {compress_over}")
        self._compress: Algorithm | None = compress
        # One comparison on the hot path: a body up to this size goes as it is.
        self._plain_bytes_max = min(compress_over, BODY_BYTES_MAX) if compress else BODY_BYTES_MAX
        self._kinds = {body_type: kind_of(body_type) for body_type in types.values()}
        self._types = dict(types)  # type id -> the class that decoding answers
        self._readers: dict[str, Read] = {type_id: self._kinds[each].read for type_id, each in types.items()}
        self._type_ids = {each: type_id for type_id, each in types.items()}
        self._java: dict[str, str] = {}  # name of a Java class -> type id
        for name, body_type in (java or {}).items():
            if body_type not in self._type_ids:
                raise InvalidInput(f"java: {name} stands for a type that is not registered: {_name(body_type)}")
            self._java[name] = self._type_ids[body_type]
        for source, chain in chains(upcasters or {}, types).items():
            self._readers[source] = upcasting(chain, self._kinds[types[chain.target]].read)
            self._types[source] = types[chain.target]
        java_names = {body_type: name for name, body_type in (java or {}).items()}
        self._writers: dict[type, tuple[Properties, Write]] = {}
        for each, type_id in self._type_ids.items():
            headers = {JAVA_TYPE: java_names[each]} if each in java_names else {}
            self._writers[each] = (Properties(type=type_id, headers=headers), self._kinds[each].write)

    def encode(self, body: Any) -> tuple[Properties, bytes]:
        """The body as JSON, with what a message is to say of it.

        Raises `InvalidInput` for a class that is not registered, a body over the limit, NaN and infinities, and values
        that JSON cannot hold.
        """
        try:
            properties, write = self._writers[type(body)]
        except KeyError:
            raise InvalidInput(f"{type(body).__name__} has no type id; add it to the codec's types") from None
        try:
            encoded = write(body)
        except Exception as error:
            raise InvalidInput(f"a {properties.type} cannot be written as JSON: {write_fault(error)}") from None
        if len(encoded) > self._plain_bytes_max:
            return self._large(properties, encoded)
        return properties, encoded

    def _large(self, properties: Properties, encoded: bytes) -> tuple[Properties, bytes]:
        """Refuse a body over the limit, compress one that may be compressed."""
        if len(encoded) > BODY_BYTES_MAX:
            raise InvalidInput(f"a {properties.type} of {len(encoded)} bytes is over the limit of {BODY_BYTES_MAX}")
        if self._compress is not None:
            packed = compression.compressed(encoded, self._compress)
            if len(packed) < len(encoded):
                headers = {**properties.headers, CONTENT_ENCODING: self._compress}
                return msgspec.structs.replace(properties, headers=headers), packed
        return properties, encoded

    def decode(self, message: Message, expected: type | None = None) -> Any:
        """Decode by the message's type id; where that is unknown or missing, by the Java class in its headers.

        With `expected` a message that names no type of ours is taken for one of that class, registered or not; one that
        names another type of ours is refused all the same.

        Raises `CannotDecode` for an unknown type, another content type, an oversize body (also one that expands beyond
        the limit) or a wrong shape; the text names the place and never repeats the body.
        """
        if expected is None:
            try:
                read = self._readers[message.type]
            except KeyError:
                _, read = self._choose(message, None)
        else:
            _, read = self._choose(message, expected)
        if message.content_type != JSON:
            _require_json(message.content_type)
        body = message.body
        if len(body) > BODY_BYTES_MAX:
            raise CannotDecode(f"a body of {len(body)} bytes is over the limit of {BODY_BYTES_MAX}")
        if CONTENT_ENCODING in message.headers:
            body = compression.expanded(body, message.headers[CONTENT_ENCODING], BODY_BYTES_MAX)
        try:
            return read(body)
        except Exception as error:  # a class's own rule may raise anything, and another try cannot mend it
            name, _ = self._choose(message, expected)
            raise CannotDecode(f"the body is no {name}: {fault(error)}") from None

    def _choose(self, message: Message, expected: type | None) -> tuple[str, Read]:
        """The type id (or name) to decode by and its reader, when the message's `type` alone does not say it."""
        type_id = message.type
        java = message.headers.get(JAVA_TYPE, "")
        if type_id not in self._readers:
            type_id = self._java.get(java, type_id)
        read = self._readers.get(type_id)
        if expected is None:
            if read is None:
                told = f"{message.type[:80]!r}" + (f" ({JAVA_TYPE} {java[:80]!r})" if java else "")
                raise CannotDecode(f"unknown message type {told}; known: {', '.join(sorted(self._readers))}")
            return type_id, read
        if read is None:
            if expected not in self._kinds:
                self._kinds[expected] = kind_of(expected)
            return expected.__name__, self._kinds[expected].read
        if self._types[type_id] is not expected:
            raise CannotDecode(f"a {type_id[:80]} is no {expected.__name__}, which is what its handler takes")
        return type_id, read


def _name(body_type: Any) -> str:
    return str(getattr(body_type, "__name__", body_type))


def _require_json(content_type: str) -> None:
    """Raise `CannotDecode` for what is not JSON in UTF-8."""
    media, *parameters = content_type.lower().split(";")
    if media.strip() not in ASSUMED_JSON:
        raise CannotDecode(f"content type {content_type[:80]!r} is not {JSON}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in UTF_8:
            raise CannotDecode(f"content type {content_type[:80]!r} is not {JSON} in UTF-8")
