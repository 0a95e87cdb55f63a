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
from holdfast.messaging.codec import Codec, Properties
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
    properties, encoded = CODEC.encode(body)
    assert CODEC.decode(message(encoded, properties.type)) == body


def test_fields_are_written_in_camel_case_under_the_type_id() -> None:
    properties, encoded = CODEC.encode(Greeting(who="Ann"))
    assert properties == Properties(type="demo.greeting", content_type="application/json", headers={})
    assert encoded == b'{"who":"Ann","timesSaid":1,"colour":"red"}'


def test_an_unregistered_type_is_not_encoded() -> None:
    with pytest.raises(InvalidInput, match="Stranger has no type id"):
        CODEC.encode(Stranger())


@pytest.mark.parametrize("kind", ["", "demo.Greeting", "builtins.dict", "x" * 10_000])
def test_an_unknown_type_is_refused_with_the_known_ones(kind: str) -> None:
    detail = refusal(message(b"{}", kind))
    assert detail.startswith(f"unknown message type {kind[:80]!r}; known: demo.anything, demo.greeting")
    assert len(detail) < 200


@pytest.mark.parametrize(
    "content_type",
    [
        *("text/plain", "application/x-java-serialized-object", "y" * 10_000, "json", "application/jsonp"),
        *("text/plain;application/json", "application/json/", "application/vnd.mall+json"),
    ],
)
def test_another_content_type_is_refused(content_type: str) -> None:
    detail = refusal(message(b'{"who":"Ann"}', content_type=content_type))
    assert detail == f"content type {content_type[:80]!r} is not application/json"


def test_an_oversize_body_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "BODY_BYTES_MAX", 20)
    assert CODEC.decode(message(b'{"who":"' + b"x" * 10 + b'"}')) == Greeting(who="x" * 10)
    assert refusal(message(b'{"who":"' + b"x" * 11 + b'"}')) == "a body of 21 bytes is over the limit of 20"


def test_an_oversize_body_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "BODY_BYTES_MAX", 50)
    for compress in (None, "gzip"):
        codec = Codec({"demo.anything": Anything}, compress=compress)
        assert len(codec.encode(Anything("x" * 38))[1]) == 50
        with pytest.raises(InvalidInput, match=r"^a demo.anything of 51 bytes is over the limit of 50$"):
            codec.encode(Anything("x" * 39))


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
    damaged = bytearray(CODEC.encode(Greeting(who=who))[1])
    damaged[at % len(damaged)] = byte
    with suppress(CannotDecode):
        assert isinstance(CODEC.decode(message(bytes(damaged))), Greeting)


# -- what a handler expects -------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True):
    """A body that the codec does not know."""

    text: str


@pytest.mark.parametrize("kind", ["", "something.else"])
def test_the_handlers_type_decides_when_the_message_names_none_of_ours(kind: str) -> None:
    assert CODEC.decode(message(b'{"who":"Ann"}', kind), expected=Greeting) == Greeting(who="Ann")
    assert CODEC.decode(message(b'{"text":"hi"}', kind), expected=Reply) == Reply("hi")
    assert CODEC.decode(message(b"7", kind, ""), expected=int) == 7
    with pytest.raises(CannotDecode, match=r"^the body is no Reply: Expected `object`, got `array`$"):
        CODEC.decode(message(b"[]", kind), expected=Reply)
    with pytest.raises(InvalidInput, match=r"^object cannot be a body"):
        CODEC.decode(message(b"[]", kind), expected=object)


def test_a_message_that_names_another_type_of_ours_is_not_what_the_handler_expects() -> None:
    assert CODEC.decode(message(b'{"who":"Ann"}'), expected=Greeting) == Greeting(who="Ann")
    with pytest.raises(CannotDecode, match=r"^a demo.greeting is no Anything, which is what its handler takes$"):
        CODEC.decode(message(b'{"who":"Ann","value":1}'), expected=Anything)


# -- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["gzip", "zstd"])
def test_large_bodies_travel_compressed(algorithm: Any) -> None:
    codec = Codec({"demo.anything": Anything}, compress=algorithm, compress_over=100)
    small, large = Anything("x" * 88), Anything("x" * 89)
    assert codec.encode(small) == CODEC.encode(small)
    properties, packed = codec.encode(large)
    assert properties == Properties(
        type="demo.anything", content_type="application/json", headers={"content-encoding": algorithm}
    )
    assert len(packed) < 100
    told = msgspec.structs.replace(message(packed, properties.type), headers=properties.headers)
    assert CODEC.decode(told) == large, "reading needs no setting"
    assert "body" in refusal(message(packed, properties.type)), "without the header it is no JSON"


def test_what_compression_would_not_make_smaller_travels_as_it_is() -> None:
    codec = Codec({"demo.anything": Anything}, compress="gzip", compress_over=0)
    assert codec.encode(Anything(1)) == CODEC.encode(Anything(1))


def test_an_expanded_body_is_held_to_the_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    properties, packed = Codec({"demo.anything": Anything}, compress="gzip").encode(Anything("x" * 5_000))
    monkeypatch.setattr(codec_module, "BODY_BYTES_MAX", 5_000)
    told = msgspec.structs.replace(message(packed, properties.type), headers=properties.headers)
    assert refusal(told) == "the body expands beyond the limit of 5000 bytes"


@steady
@given(body=st.binary(max_size=60), encoding=st.sampled_from(["gzip", "zstd", "UTF-8", "br"]))
def test_any_bytes_under_any_encoding_decode_or_are_refused(body: bytes, encoding: str) -> None:
    told = msgspec.structs.replace(message(body, "demo.anything"), headers={"content-encoding": encoding})
    with suppress(CannotDecode):
        assert isinstance(CODEC.decode(told), Anything)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compress": "br"}, "compress must be 'gzip', 'zstd' or None, not 'br'"),
        ({"compress": "gzip", "compress_over": -1}, "compress_over is a number of bytes, not -1"),
    ],
)
def test_settings_of_compression_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Codec({}, **options)
    assert caught.value.detail == told
