"""Java: golden samples in the form of Spring's JSON converter, read literally, and what it is given in return."""

from __future__ import annotations

import gzip
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from holdfast.errors import CannotDecode, InvalidInput
from holdfast.messaging.codec import Codec, Properties
from holdfast.messaging.message import Message


class OrderTo(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An order as a Java mall tells of it."""

    id: int
    order_sn: str
    pay_amount: Decimal | None = None
    create_time: int | None = None  # java.util.Date: milliseconds of the epoch


class StockLockedTo(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What was locked for it."""

    id: int
    sku_ids: list[int]


class Ours(msgspec.Struct, frozen=True):
    """A body that no Java service knows."""

    id: int


ORDER_TO = "com.mall.common.to.OrderTo"
STOCK_LOCKED_TO = "com.mall.common.to.StockLockedTo"
CODEC = Codec(
    {"order.released": OrderTo, "stock.locked": StockLockedTo, "ours": Ours, "pay.success": int, "rows": list},
    java={
        ORDER_TO: OrderTo,
        STOCK_LOCKED_TO: StockLockedTo,
        "java.lang.Long": int,
        "java.util.ArrayList": list,
    },
)

ORDER_BODY = b'{"id":1790000000000000001,"orderSn":"202611210001","payAmount":19.90,"createTime":1700000000000}'
ORDER = OrderTo(id=1790000000000000001, order_sn="202611210001", pay_amount=Decimal("19.90"), create_time=1700000000000)


def spring(body: bytes, headers: dict[str, str], *, content_type: str = "application/json", kind: str = "") -> Message:
    """A message as Spring's RabbitTemplate sends it: no `type` property unless asked for."""
    return Message(
        exchange="order-event-exchange",
        routing_key="order.release.other",
        body=body,
        message_id="5f2c7f0e-1c1b-4bb0-9a53-6d5c6f6f5a10",
        timestamp_us=0,
        type=kind,
        content_type=content_type,
        headers=headers,
    )


GOLDEN: dict[str, tuple[Message, Any]] = {
    "a class of the mall": (spring(ORDER_BODY, {"__TypeId__": ORDER_TO, "content-encoding": "UTF-8"}), ORDER),
    "with another type property": (spring(ORDER_BODY, {"__TypeId__": ORDER_TO}, kind="order"), ORDER),
    "with a charset": (
        spring(ORDER_BODY, {"__TypeId__": ORDER_TO}, content_type="application/json;charset=UTF-8"),
        ORDER,
    ),
    "without a content type": (spring(ORDER_BODY, {"__TypeId__": ORDER_TO}, content_type=""), ORDER),
    "as plain bytes": (spring(ORDER_BODY, {"__TypeId__": ORDER_TO}, content_type="application/octet-stream"), ORDER),
    "unknown fields": (
        spring(
            b'{"id":88,"skuIds":[1,2],"detailTo":{"lockStatus":1,"wareId":null}}',
            {"__TypeId__": STOCK_LOCKED_TO},
        ),
        StockLockedTo(id=88, sku_ids=[1, 2]),
    ),
    "a bare Long": (spring(b"1790000000000000001", {"__TypeId__": "java.lang.Long"}), 1790000000000000001),
    "a collection": (
        spring(
            b'[{"id":1},{"id":2}]',
            {"__TypeId__": "java.util.ArrayList", "__ContentTypeId__": ORDER_TO, "__KeyTypeId__": "java.lang.String"},
        ),
        [{"id": 1}, {"id": 2}],
    ),
    "compressed": (
        spring(gzip.compress(ORDER_BODY), {"__TypeId__": ORDER_TO, "content-encoding": "gzip, UTF-8"}),
        ORDER,
    ),
    "compressed, before 2.3": (
        spring(gzip.compress(ORDER_BODY), {"__TypeId__": ORDER_TO, "content-encoding": "gzip:UTF-8"}),
        ORDER,
    ),
    # With the header of a GZIPOutputStream: no time, no name, operating system 0.
    "compressed, literally": (
        spring(
            bytes.fromhex("1f8b0800000000000000ab56ca4c51b2b230d451ca2f4a492d0ace53b25252aa05000db1521f16000000"),
            {"__TypeId__": ORDER_TO, "content-encoding": "gzip, UTF-8"},
        ),
        OrderTo(id=81, order_sn=""),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_spring_sends_is_read(name: str) -> None:
    message, body = GOLDEN[name]
    assert CODEC.decode(message) == body


def test_what_spring_is_given() -> None:
    assert CODEC.encode(OrderTo(id=7, order_sn="S7")) == (
        Properties(
            type="order.released",
            content_type="application/json",
            headers={"__TypeId__": "com.mall.common.to.OrderTo"},
        ),
        b'{"id":7,"orderSn":"S7","payAmount":null,"createTime":null}',
    )
    assert CODEC.encode(7) == (Properties(type="pay.success", headers={"__TypeId__": "java.lang.Long"}), b"7")
    assert CODEC.encode(Ours(7)) == (Properties(type="ours", headers={}), b'{"id":7}')


def test_a_compressed_body_keeps_its_java_name() -> None:
    codec = Codec({"order.released": OrderTo}, java={ORDER_TO: OrderTo}, compress="gzip", compress_over=10)
    properties, packed = codec.encode(OrderTo(id=7, order_sn="S" * 100))
    assert properties.headers == {"__TypeId__": ORDER_TO, "content-encoding": "gzip"}
    assert codec.decode(spring(packed, dict(properties.headers))) == OrderTo(id=7, order_sn="S" * 100)


def test_a_known_type_property_comes_before_the_java_name() -> None:
    message = spring(b'{"id":1}', {"__TypeId__": ORDER_TO}, kind="ours")
    assert CODEC.decode(message) == Ours(1)


@pytest.mark.parametrize("java", ["com.mall.Other", "java.util.HashMap", "order.released", "x" * 10_000])
def test_an_unknown_java_name_builds_nothing(java: str) -> None:
    message = spring(ORDER_BODY, {"__TypeId__": java})
    with pytest.raises(CannotDecode) as caught:
        CODEC.decode(message)
    assert caught.value.detail.startswith(f"unknown message type '' (__TypeId__ {java[:80]!r}); known: order.released,")
    assert len(caught.value.detail) < 250
    assert CODEC.decode(message, expected=OrderTo) == ORDER, "the handler's own type decides"


def test_a_java_name_of_another_type_of_ours_is_not_what_the_handler_expects() -> None:
    with pytest.raises(CannotDecode, match=r"^a order.released is no Ours"):
        CODEC.decode(spring(ORDER_BODY, {"__TypeId__": ORDER_TO}), expected=Ours)


def test_a_wrong_body_under_a_java_name_is_refused() -> None:
    with pytest.raises(CannotDecode, match=r"^the body is no order.released: Expected `int`, got `str` - at `\$.id`$"):
        CODEC.decode(spring(b'{"id":"correct-horse-battery"}', {"__TypeId__": ORDER_TO}))


def test_a_java_name_of_an_unregistered_class_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"java: com\.mall\.Ours stands for a type that is not registered: Ours"):
        Codec({"order.released": OrderTo}, java={"com.mall.Ours": Ours})
