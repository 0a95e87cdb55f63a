"""Upcasting: old versions are read as the newest one, or refused with the step that failed."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from holdfast.errors import CannotDecode, InvalidInput
from holdfast.messaging.codec import Codec
from holdfast.messaging.message import Message
from holdfast.messaging.upcasting import Upcaster
from tests.unit.given import steady

HIDDEN = "correct-horse-battery"


class Created(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The newest version."""

    order_id: int
    buyer: str
    items: Annotated[int, msgspec.Meta(ge=1)]


class CreatedV1(msgspec.Struct, frozen=True):
    """The first version, still written by somebody."""

    id: int
    who: str


def to_v2(old: dict[str, Any]) -> dict[str, Any]:
    old["orderId"] = old.pop("id")  # its own copy: it may be changed
    return old


def to_v3(old: dict[str, Any]) -> dict[str, Any]:
    return {"orderId": old["orderId"], "buyer": old["who"], "items": old.get("items", 1)}


CODEC = Codec(
    {"order.created.v3": Created, "order.created.v1": CreatedV1},
    upcasters={
        "order.created.v1": ("order.created.v2", to_v2),
        "order.created.v2": ("order.created.v3", to_v3),
    },
)


def message(body: bytes, kind: str = "order.created.v1") -> Message:
    return Message(exchange="e", routing_key="k", body=body, message_id="m", timestamp_us=0, type=kind)


def refusal(body: bytes, step: Upcaster | None = None) -> str:
    codec = Codec({"new": Created}, upcasters={"order.created.v1": ("new", step)}) if step else CODEC
    with pytest.raises(CannotDecode) as caught:
        codec.decode(message(body))
    assert caught.value.__cause__ is None
    assert HIDDEN not in caught.value.detail
    return caught.value.detail


def test_each_old_version_is_read_as_the_newest() -> None:
    newest = Created(order_id=2**62 + 1, buyer="Ann", items=1)
    assert CODEC.decode(message(b'{"id":4611686018427387905,"who":"Ann"}')) == newest
    assert CODEC.decode(message(b'{"orderId":4611686018427387905,"who":"Ann"}', "order.created.v2")) == newest
    assert CODEC.decode(message(CODEC.encode(newest)[1], "order.created.v3")) == newest


def test_an_old_version_with_a_class_is_still_written() -> None:
    properties, encoded = CODEC.encode(CreatedV1(id=1, who="Ann"))
    assert (properties.type, encoded) == ("order.created.v1", b'{"id":1,"who":"Ann"}')


@steady
@given(number=st.integers(0, 2**63 - 1), who=st.text(st.characters(exclude_categories=["Cs"])))
def test_what_was_written_as_an_old_version_is_read_whole(number: int, who: str) -> None:
    _, encoded = CODEC.encode(CreatedV1(id=number, who=who))
    assert CODEC.decode(message(encoded)) == Created(order_id=number, buyer=who, items=1)


def test_a_model_of_pydantic_may_stand_at_the_end() -> None:
    class Paid(BaseModel):
        order: int

    codec = Codec({"paid.v2": Paid}, upcasters={"paid.v1": ("paid.v2", lambda old: {"order": old["id"]})})
    assert codec.decode(message(b'{"id":7}', "paid.v1")) == Paid(order=7)
    with pytest.raises(CannotDecode, match=r"upcast to paid.v2: int_parsing - at `\$.order`") as caught:
        codec.decode(message(b'{"id":"correct-horse-battery"}', "paid.v1"))
    assert HIDDEN not in caught.value.detail


def test_the_newest_version_is_what_a_handler_expects() -> None:
    assert CODEC.decode(message(b'{"id":1,"who":"Ann"}'), expected=Created).buyer == "Ann"
    with pytest.raises(CannotDecode, match=r"a order.created.v1 is no CreatedV1"):
        CODEC.decode(message(b'{"id":1,"who":"Ann"}'), expected=CreatedV1)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"correct-horse-battery"', b"7", b"{", b"", b"\xff"])
def test_only_an_object_is_given_to_an_upcaster(body: bytes) -> None:
    def never(old: dict[str, Any]) -> dict[str, Any]:
        pytest.fail(f"was called with {old}")

    assert refusal(body, never).startswith("the body is no order.created.v1: ")


def test_an_upcaster_that_raises_is_named_without_its_text() -> None:
    body = b'{"correct-horse-battery":1}'
    assert refusal(body) == "the body is no order.created.v1: the upcaster to order.created.v2 raised KeyError"

    def quoting(old: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError(str(old))

    assert refusal(body, quoting) == "the body is no order.created.v1: the upcaster to new raised RuntimeError"

    def ours(old: dict[str, Any]) -> dict[str, Any]:
        raise InvalidInput("orders of before 2020 are not read")

    assert refusal(body, ours).endswith("raised InvalidInput: orders of before 2020 are not read")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "the upcaster to new answered NoneType instead of a dict"),
        ([], "the upcaster to new answered list instead of a dict"),
        ({"x": object()}, "the upcaster to new answered no JSON: Encoding objects of type object is unsupported"),
        (
            {"x": float("nan")},
            "the upcaster to new answered no JSON: it holds NaN or an infinity, and JSON has no such",
        ),
        ({"x": "\ud800"}, "the upcaster to new answered no JSON: a text in it is no Unicode"),
        ({}, "upcast to new: Object missing required field `orderId`"),
        ({"orderId": 1, "buyer": HIDDEN, "items": 0}, "upcast to new: Expected `int` >= 1 - at `$.items`"),
    ],
)
def test_what_an_upcaster_answers_is_checked(answer: Any, told: str) -> None:
    assert refusal(b"{}", lambda _: answer).startswith(f"the body is no order.created.v1: {told}")


@steady
@given(body=st.binary(max_size=40) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_upcast_or_refused(body: bytes) -> None:
    for kind in ("order.created.v1", "order.created.v2"):
        with suppress(CannotDecode):
            assert isinstance(CODEC.decode(message(body, kind)), Created)


def made(upcasters: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        Codec({"new": Created}, upcasters=upcasters)
    return caught.value.detail


def test_upcasters_that_lead_nowhere_are_refused() -> None:
    assert made({"a": ("b", to_v2), "b": ("a", to_v2)}) == "upcasters go in a circle: a -> b -> a"
    assert made({"a": ("a", to_v2)}) == "upcasters go in a circle: a -> a"
    assert made({"new": ("new", to_v2)}) == "upcasters go in a circle: new -> new"
    assert made({"x": ("a", to_v2), "a": ("b", to_v2), "b": ("a", to_v2)}).startswith("upcasters go in a circle: x -> ")
    assert made({"a": ("b", to_v2)}) == "upcasters a -> b end at a type that is not registered: b"
    assert made({"a": ("new", None)}) == "the upcaster a -> new is no function"
