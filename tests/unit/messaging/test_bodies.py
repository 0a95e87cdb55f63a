"""Bodies: every kind of class survives the wire, is read strictly, and is refused without a word of the body."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from holdfast.errors import CannotDecode, InvalidInput
from holdfast.messaging.codec import Codec
from holdfast.messaging.message import Message
from tests.unit.given import steady

HIDDEN = "correct-horse-battery"


@dataclass(frozen=True)
class Line:
    """A part of a dataclass."""

    sku: str
    quantity: int


@dataclass
class Basket:
    """A body that is a dataclass."""

    buyer: str
    lines: list[Line] = field(default_factory=list)
    note: str | None = None

    def __post_init__(self) -> None:
        if self.note == HIDDEN:
            raise ValueError(f"{self.note} is no note")


class Model(BaseModel):
    """A body that is a pydantic model, in camel case on the wire."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")

    buyer_name: str
    quantity: int = Field(default=1, ge=0)
    colour: Literal["red"] = "red"
    tags: dict[str, int] = {}
    lines: list[Line] = []

    @pydantic.field_validator("buyer_name")
    @classmethod
    def no_secret(cls, value: str) -> str:
        if value == HIDDEN:
            raise ValueError(f"{value} is no name")
        if value == "lookup":
            raise KeyError(HIDDEN)
        return value


class Measured(BaseModel):
    """A model with a float, written as its configuration says."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    weight: float | None


class Tree(msgspec.Struct):
    """A struct that holds itself, and a float far down."""

    children: list[Tree] = []
    weights: dict[str, tuple[float, ...]] | None = None


class Bare(msgspec.Struct):
    """A struct without floats."""

    number: int | None = None
    text: str = ""


TYPES: dict[str, type] = {
    "basket": Basket,
    "model": Model,
    "measured": Measured,
    "tree": Tree,
    "bare": Bare,
    "dict": dict,
    "list": list,
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "none": type(None),
}
CODEC = Codec(TYPES)

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | floats | unicode,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(unicode, inner, max_size=4),
    max_leaves=10,
)
baskets = st.builds(Basket, unicode, st.lists(st.builds(Line, unicode, numbers), max_size=3), st.none() | unicode)
models = st.builds(
    lambda name, quantity, tags: Model.model_validate({"buyerName": name, "quantity": quantity, "tags": tags}),
    unicode.filter(lambda name: name != "lookup"),
    st.integers(0, 2**63),
    st.dictionaries(unicode, numbers, max_size=3),
)
bodies = (
    baskets
    | models
    | st.builds(Measured, weight=st.none() | floats)
    | st.builds(Tree, weights=st.none() | st.dictionaries(unicode, st.lists(floats, max_size=3).map(tuple), max_size=3))
    | st.dictionaries(unicode, json_values, max_size=4)
    | st.lists(json_values, max_size=4)
    | unicode
    | numbers
    | floats
    | st.booleans()
    | st.none()
)


def message(body: bytes, kind: str) -> Message:
    return Message(exchange="e", routing_key="k", body=body, message_id="m", timestamp_us=0, type=kind)


def refusal(body: bytes, kind: str) -> str:
    with pytest.raises(CannotDecode) as caught:
        CODEC.decode(message(body, kind))
    assert caught.value.__cause__ is None
    assert HIDDEN not in caught.value.detail
    prefix = f"the body is no {kind}: "
    assert caught.value.detail.startswith(prefix)
    return caught.value.detail.removeprefix(prefix)


def unwritable(body: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        CODEC.encode(body)
    assert caught.value.__cause__ is None
    assert HIDDEN not in caught.value.detail
    return caught.value.detail


@steady
@given(body=bodies)
def test_a_body_of_any_kind_survives_the_wire(body: Any) -> None:
    properties, encoded = CODEC.encode(body)
    decoded = CODEC.decode(message(encoded, properties.type))
    assert type(decoded) is type(body), "a handler is found by the class"
    assert decoded == body


@steady
@given(
    body=st.binary(max_size=40)
    | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | json_values.map(msgspec.json.encode),
    kind=st.sampled_from(sorted(TYPES)),
)
def test_any_bytes_decode_or_are_refused(body: bytes, kind: str) -> None:
    with suppress(CannotDecode):
        assert type(CODEC.decode(message(body, kind))) is TYPES[kind]


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"children":[' * 50_000, b"9" * 5_000, b'{"a":' * 100_000])
def test_a_hostile_body_is_refused(kind: str, body: bytes) -> None:
    refusal(body, kind)


def test_each_kind_is_written_under_its_id() -> None:
    assert CODEC.encode(Basket("Ann", [Line("s1", 2)]))[1] == (
        b'{"buyer":"Ann","lines":[{"sku":"s1","quantity":2}],"note":null}'
    )
    assert CODEC.encode(Model.model_validate({"buyerName": "Ann"}))[1] == (
        b'{"buyerName":"Ann","quantity":1,"colour":"red","tags":{},"lines":[]}'
    )
    plain: list[Any] = [{}, [], "a", 1, 1.5, True, None]
    written = {(properties.type, encoded) for properties, encoded in map(CODEC.encode, plain)}
    assert written == {
        *(("dict", b"{}"), ("list", b"[]"), ("str", b'"a"'), ("int", b"1"), ("float", b"1.5")),
        *(("bool", b"true"), ("none", b"null")),
    }


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("int", b"true", "Expected `int`, got `bool`"),
        ("int", b"1.0", "Expected `int`, got `float`"),
        ("int", b'"1"', "Expected `int`, got `str`"),
        ("bool", b"1", "Expected `bool`, got `int`"),
        ("str", b"null", "Expected `str`, got `null`"),
        ("none", b"0", "Expected `null`, got `int`"),
        ("dict", b"[]", "Expected `object`, got `array`"),
        ("list", b"{}", "Expected `array`, got `object`"),
        ("float", b"NaN", "JSON is malformed: invalid character (byte 0)"),
        ("basket", b'{"buyer":1}', "Expected `str`, got `int` - at `$.buyer`"),
        (
            "basket",
            b'{"buyer":"a","lines":[{"sku":"a"}]}',
            "Object missing required field `quantity` - at `$.lines[0]`",
        ),
        ("basket", b'{"buyer":"a","note":"correct-horse-battery"}', "its own rule refuses it (ValueError)"),
    ],
)
def test_a_body_is_read_strictly(kind: str, body: bytes, told: str) -> None:
    assert refusal(body, kind) == told


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[]", "model_type - at `$`"),
        (b"{", "json_invalid - at `$`"),
        (b"{}", "missing - at `$.buyerName`"),
        (b'{"buyerName":"Ann","quantity":-1}', "greater_than_equal - at `$.quantity`"),
        (b'{"buyerName":"Ann","quantity":"correct-horse-battery"}', "int_parsing - at `$.quantity`"),
        (b'{"buyerName":"Ann","colour":"correct-horse-battery"}', "literal_error - at `$.colour`"),
        (b'{"buyerName":"Ann","correct-horse-battery":1}', "extra_forbidden - at `$[...]`"),
        (b'{"buyerName":"Ann","tags":{"correct-horse-battery":"x"}}', "int_parsing - at `$.tags[...]`"),
        (b'{"buyerName":"Ann","lines":[{"sku":"s","quantity":"x"}]}', "int_parsing - at `$.lines[0][...]`"),
        (b'{"buyerName":"correct-horse-battery"}', "value_error - at `$.buyerName`"),
        (b'{"buyerName":"lookup"}', "its own rule refuses it (KeyError)"),
        (b'{"buyerName":7,"quantity":"x"}', "string_type - at `$.buyerName` and 1 more"),
        (b'{"buyerName":"\xff"}', "json_invalid - at `$`"),
    ],
)
def test_a_model_tells_type_and_place_of_its_fault(body: bytes, told: str) -> None:
    assert refusal(body, "model") == told


NO_NUMBER = "cannot be written as JSON: it holds NaN or an infinity, and JSON has no such number"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (float("nan"), f"a float {NO_NUMBER}"),
        (float("-inf"), f"a float {NO_NUMBER}"),
        ({"a": [{"b": float("inf")}]}, f"a dict {NO_NUMBER}"),
        ([None, (float("nan"),)], f"a list {NO_NUMBER}"),
        (Tree([Tree([Tree(weights={"a": (1.0, float("nan"))})])]), f"a tree {NO_NUMBER}"),
        (Measured(weight=float("nan")), f"a measured {NO_NUMBER}"),
        (Measured(weight=float("inf")), f"a measured {NO_NUMBER}"),
        ({"a": object()}, "a dict cannot be written as JSON: Encoding objects of type object is unsupported"),
        ({(1, 2): 3}, "a dict cannot be written as JSON: Only dicts with str-like or number-like keys are supported"),
        (
            "correct-horse-battery \ud800",
            "a str cannot be written as JSON: a text in it is no Unicode (half a surrogate",
        ),
        (Basket(buyer="\udfff"), "a basket cannot be written as JSON: a text in it is no Unicode"),
        (Bare(text=[1j]), "a bare cannot be written as JSON: Encoding objects of type complex"),  # type: ignore[arg-type]
        (Model.model_construct(buyer_name=[HIDDEN]), "a model cannot be written as JSON: PydanticSerializationError"),
    ],
)
def test_what_json_cannot_hold_is_refused(body: Any, told: str) -> None:
    assert unwritable(body).startswith(told)


def test_a_body_that_holds_itself_is_refused() -> None:
    body: list[Any] = []
    body.append(body)
    assert unwritable(body) == "a list cannot be written as JSON: it is nested too deeply, or holds itself"


def test_null_and_the_word_nan_are_no_nan() -> None:
    for body in ({"a": None, "NaN": "null Infinity"}, Tree(), Measured(weight=None), ["NaN"], "null"):
        properties, encoded = CODEC.encode(body)
        assert CODEC.decode(message(encoded, properties.type)) == body


def test_values_that_json_lacks_but_msgspec_writes_arrive_as_text() -> None:
    body = {"at": datetime(2026, 1, 2, 3, 4, 5), "price": Decimal("1.10")}  # noqa: DTZ001
    assert CODEC.decode(message(CODEC.encode(body)[1], "dict")) == {"at": "2026-01-02T03:04:05", "price": "1.10"}


def test_a_class_with_several_ids_is_read_under_each_and_written_under_the_last() -> None:
    codec = Codec({"old": Bare, "new": Bare})
    assert codec.encode(Bare(1))[0].type == "new"
    assert codec.decode(message(b'{"number":1}', "old")) == codec.decode(message(b'{"number":1}', "new")) == Bare(1)


def test_a_subclass_is_another_class() -> None:
    class Sub(dict[str, Any]):
        """A dict, but not exactly."""

    assert unwritable(Sub()) == "Sub has no type id; add it to the codec's types"


class Choice(Enum):
    """No body."""

    A = "a"


@pydantic.dataclasses.dataclass
class HalfModel:
    """A dataclass whose validation msgspec would pass by."""

    count: Annotated[int, Field(ge=0)]


class Unreadable(msgspec.Struct):
    """A struct that msgspec cannot read: no telling which of the two it is."""

    value: Line | Basket


@pytest.mark.parametrize(
    ("body_type", "told"),
    [
        (
            object,
            "object cannot be a body; use a msgspec struct, a dataclass, a pydantic model, or one of NoneType, bool",
        ),
        (Choice, "Choice cannot be a body"),
        (bytes, "bytes cannot be a body"),
        (list[int], "list[int] is no class; register list, dict, type(None), a struct or a model"),
        (None, "None is no class; register list, dict, type(None)"),
        (Basket("Ann"), "Basket(buyer='Ann', lines=[], note=None) is no class"),
        (HalfModel, "HalfModel: a pydantic dataclass would not be validated; make it a BaseModel"),
        (Unreadable, "Unreadable cannot be read from JSON: Type unions may not contain more than one"),
    ],
)
def test_what_cannot_be_a_body_is_refused_when_it_is_registered(body_type: Any, told: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Codec({"a": body_type})
    assert caught.value.detail.startswith(told)
