"""Delivery and Settlement: one handing-over, settled once."""

from __future__ import annotations

import msgspec
import pytest

from holdfast.errors import AlreadySettled
from holdfast.messaging.message import JSON, Delivery, Message, Outgoing, Settlement, ack, reject, retry

MESSAGE = Message(exchange="orders", routing_key="order.paid", body=b"{}", message_id="m-1", timestamp_us=7)


def delivery() -> Delivery:
    return Delivery(message=MESSAGE, queue="mail", attempt=2, deliveries=3, receipt=None)


def test_a_delivery_is_settled_exactly_once() -> None:
    given = delivery()

    given.mark_settled()

    assert given.settled
    with pytest.raises(AlreadySettled, match="message m-1 from mail was settled before"):
        given.mark_settled()
    assert given.settled


def test_two_deliveries_of_one_message_are_settled_apart() -> None:
    first, second = delivery(), delivery()
    first.mark_settled()
    assert not second.settled
    second.mark_settled()


def test_asking_for_a_settlement_settles_nothing_yet() -> None:
    given = delivery()
    for settlement in (ack(given), retry(given, 10), reject(given, "no use")):
        assert settlement.delivery is given
    assert not given.settled


def test_settlements_say_what_becomes_of_the_delivery() -> None:
    given = delivery()
    assert ack(given) == Settlement(delivery=given, kind="ack", after_ms=0, counts=True, reason="")
    assert retry(given, 250, reason="busy") == Settlement(delivery=given, kind="retry", after_ms=250, reason="busy")
    assert retry(given, 250, counts=False).counts is False
    assert reject(given, "no use") == Settlement(delivery=given, kind="reject", reason="no use")


def test_a_delivery_takes_no_further_attributes() -> None:
    with pytest.raises(AttributeError):
        delivery().colour = "red"  # type: ignore[attr-defined]  # the case itself


def test_a_message_is_json_without_headers_and_cannot_be_changed() -> None:
    assert (MESSAGE.content_type, MESSAGE.headers, MESSAGE.type) == (JSON, {}, "")
    with pytest.raises(AttributeError):
        MESSAGE.body = b""  # type: ignore[misc]  # the case itself


def test_messages_do_not_share_their_headers() -> None:
    other = msgspec.structs.replace(MESSAGE, headers={"traceparent": "x"})
    assert MESSAGE.headers == {}
    assert other.headers == {"traceparent": "x"}


def test_a_message_is_mandatory_and_not_delayed_unless_said() -> None:
    outgoing = Outgoing(message=MESSAGE)
    assert (outgoing.mandatory, outgoing.delay_ms, outgoing.cancel_key) == (True, 0, None)
