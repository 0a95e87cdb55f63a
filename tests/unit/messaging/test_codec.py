"""Codec: what is decoded, what is refused, and that a refusal never repeats the body."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.errors import CannotDecode, InvalidInput
from holdfast.messaging import codec as codec_module
from holdfast.messaging.codec import Codec
from holdfast.messaging.message import JSON, Message
from tests.unit.given import steady

HIDDEN = "correct-horse-battery"


class Colour(StrEnum):
    """For bodies with a closed choice."""

    RED = "red"


class Greeting(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A body."""

    who: str
    times_said: Annotated[int, msgspec.Meta(ge=0)] = 1
    colour: Colour = Colour.RED


class Anything(msgspec.Struct):
    """A body that takes any JSON."""

    value: Any


class Stranger(msgspec.Struct):
    """A body that is not registered."""


CODEC = Codec({"demo.greeting": Greeting, "demo.anything": Anything})


def message(body: bytes, kind: str = "demo.greeting", content_type: str = JSON) -> Message:
    return Message(
        exchange="e", routing_key="k", body=body, message_id="m", timestamp_us=0, type=kind, content_type=content_type
    )


def refusal(told: Message) -> str:
    with pytest.raises(CannotDecode) as caught:
        CODEC.decode(told)
    assert caught.value.__cause__ is None, "the cause would show the body in a traceback"
    return caught.value.detail


@steady
@given(who=st.text(st.characters(exclude_categories=["Cs"])), times=st.integers(0, 2**63 - 1))
def test_a_body_survives_the_wire(who: str, times: int) -> None:
    body = Greeting(who=who, times_said=times)
    kind, encoded = CODEC.encode(body)
    assert CODEC.decode(message(encoded, kind)) == body


def test_fields_are_written_in_camel_case_under_the_type_id() -> None:
    assert CODEC.encode(Greeting(who="Ann")) == ("demo.greeting", b'{"who":"Ann","timesSaid":1,"colour":"red"}')


def test_an_unregistered_type_is_not_encoded() -> None:
    with pytest.raises(InvalidInput, match="Stranger has no type id"):
        CODEC.encode(Stranger())


@pytest.mark.parametrize("kind", ["", "demo.Greeting", "builtins.dict", "x" * 10_000])
def test_an_unknown_type_is_refused_with_the_known_ones(kind: str) -> None:
    detail = refusal(message(b"{}", kind))
    assert detail.startswith(f"unknown message type {kind[:80]!r}; known: demo.anything, demo.greeting")
    assert len(detail) < 200


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-java-serialized-object", "y" * 10_000])
def test_another_content_type_is_refused(content_type: str) -> None:
    detail = refusal(message(b'{"who":"Ann"}', content_type=content_type))
    assert detail == f"content type {content_type[:80]!r} is not application/json"


def test_an_oversize_body_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "BODY_BYTES_MAX", 20)
    assert CODEC.decode(message(b'{"who":"' + b"x" * 10 + b'"}')) == Greeting(who="x" * 10)
    assert refusal(message(b'{"who":"' + b"x" * 11 + b'"}')) == "a body of 21 bytes is over the limit of 20"


def test_the_limit_of_a_body_is_16_mebibytes() -> None:
    assert codec_module.BODY_BYTES_MAX == 16 * 1024 * 1024


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"correct-horse-battery"',
        b'{"who":1}',
        b'{"who":"correct-horse-battery","timesSaid":"correct-horse-battery"}',
        b'{"who":"correct-horse-battery","timesSaid":-1}',
        b'{"who":"correct-horse-battery","timesSaid":1e999}',
        b'{"who":"correct-horse-battery","timesSaid":' + b"9" * 5_000 + b"}",
        b'{"who":"correct-horse-battery","colour":"correct-horse-battery"}',
        b'{"who":"Ann","correct-horse-battery":1}',
        b'{"who":"correct-horse-battery"',
        b'{"who":"correct-horse-battery"} trailing',
        b'{"who":"correct-horse-battery \\ud800"}',
        b'{"who":"correct-horse-battery \xff"}',
        b'{"who":"Ann","\xff correct-horse-battery":1}',
        b"\xff\xfe",
    ],
)
def test_a_wrong_body_is_refused_without_repeating_it(body: bytes) -> None:
    detail = refusal(message(body))
    assert detail.startswith("the body is no demo.greeting: ")
    assert HIDDEN not in detail
    assert len(detail) < 300


@pytest.mark.parametrize("kind", ["demo.greeting", "demo.anything"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_deeply_nested_body_is_refused(kind: str, opening: bytes) -> None:
    field = b"who" if kind == "demo.greeting" else b"value"
    refusal(message(b'{"' + field + b'":' + opening * 200_000, kind))


@steady
@given(body=st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(body=b'{"who":"\xff"}')
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    with suppress(CannotDecode):
        assert isinstance(CODEC.decode(message(body)), Greeting)


@steady
@given(
    at=st.integers(0, 40), byte=st.integers(0, 255), who=st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
@example(at=9, byte=0xFF, who="Ann")
def test_a_damaged_byte_decodes_or_is_refused(at: int, byte: int, who: str) -> None:
    _, encoded = CODEC.encode(Greeting(who=who))
    damaged = bytearray(encoded)
    damaged[at % len(damaged)] = byte
    with suppress(CannotDecode):
        assert isinstance(CODEC.decode(message(bytes(damaged))), Greeting)
