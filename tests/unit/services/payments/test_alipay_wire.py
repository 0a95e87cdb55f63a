"""How Alipay writes things: amounts exactly, Beijing time, ids, notices and answers that are not as they should be."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import pytest
from alipay.aop.api.util.SignatureUtils import sign_with_rsa2
from hypothesis import given
from hypothesis import strategies as st

from holdfast.clock import US_PER_S
from holdfast.errors import InvalidInput
from holdfast.ids import ID_MAX
from holdfast.services.payments.alipay_signing import read_keys
from holdfast.services.payments.alipay_wire import (
    AMOUNT_MINOR_MAX,
    Unverified,
    beijing,
    captured_by,
    fen,
    instant_us,
    read_answer,
    read_notice,
    row_id,
    yuan,
)
from holdfast.services.payments.model import Capture
from holdfast.services.payments.needs import ForgedNotice
from holdfast.settings import Secret
from tests.servers.alipay import APP_ID, SELLER_ID, bare, signed_form
from tests.servers.alipay_keys import ALIPAY_PRIVATE, ALIPAY_PUBLIC, APP_PRIVATE
from tests.unit.given import steady

KEYS = read_keys(Secret(APP_PRIVATE), ALIPAY_PUBLIC)
QUERY = "alipay.trade.query"
PAYMENT_ID = 262144000000000007
TOLD = {
    "notify_id": "ac05099524730693a8b330c5ecf72da9786",
    "app_id": APP_ID,
    "seller_id": SELLER_ID,
    "out_trade_no": str(PAYMENT_ID),
    "trade_no": "2013112011001004330000121536",
    "trade_status": "TRADE_SUCCESS",
    "total_amount": "88.80",
    "gmt_payment": "2026-11-21 20:08:07",
    "charset": "utf-8",
    "body": "",
}


def told(**changes: str) -> Capture | None:
    """What a notice that Alipay signed tells of."""
    raw = signed_form({**TOLD, **changes})
    return captured_by(read_notice(raw, KEYS), raw)


# --- Amounts, times, ids ----------------------------------------------------------------------------------------------


@steady
@given(st.integers(min_value=1, max_value=AMOUNT_MINOR_MAX))
def test_amounts_go_there_and_back_exactly(amount_minor: int) -> None:
    text = yuan(amount_minor)
    assert fen(text) == amount_minor
    assert Decimal(text) * 100 == amount_minor
    assert Decimal(text).as_tuple().exponent == -2


@steady
@given(st.decimals(min_value=0, max_value=99_999_999, places=2))
def test_amounts_of_alipay_are_read_exactly(amount: Decimal) -> None:
    assert fen(str(amount)) == amount * 100
    if amount == amount.to_integral():
        assert fen(str(int(amount))) == amount * 100


@pytest.mark.parametrize(("text", "amount"), [("0.01", 1), ("20", 2_000), ("0.1", 10), ("0.29", 29), ("0.00", 0)])
def test_amounts_have_two_places_or_fewer(text: str, amount: int) -> None:
    assert fen(text) == amount


@pytest.mark.parametrize(
    "text", ["", "1.001", "-1.00", "1e2", "1,00", " 1.00", "1_0", "٣.00", "1.", ".5", "NaN", "1" * 11]
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no amount"):
        fen(text)


@pytest.mark.parametrize("amount_minor", [0, -1, AMOUNT_MINOR_MAX + 1])
def test_amounts_that_alipay_does_not_take_are_refused(amount_minor: int) -> None:
    with pytest.raises(InvalidInput, match=r"0\.01 to 100000000\.00 yuan"):
        yuan(amount_minor)


def test_times_are_those_of_beijing() -> None:
    assert beijing(1_795_262_887 * US_PER_S) == "2026-11-21 20:08:07"
    assert beijing(1_795_262_887 * US_PER_S + 999_999) == "2026-11-21 20:08:07"  # a deadline is never later than it is
    assert instant_us("2026-11-21 20:08:07") == 1_795_262_887 * US_PER_S


@steady
@given(st.integers(min_value=0, max_value=4_000_000_000))
def test_times_go_there_and_back(seconds: int) -> None:
    assert instant_us(beijing(seconds * US_PER_S)) == seconds * US_PER_S


@pytest.mark.parametrize("text", ["", "0", "-1", "007", "1.0", "٣", "0719141034-6418", str(ID_MAX + 1), "1" * 20])
def test_names_of_other_systems_are_no_ids(text: str) -> None:
    assert row_id(text) == 0


def test_ids_are_read() -> None:
    assert [row_id(str(each)) for each in (1, PAYMENT_ID, ID_MAX)] == [1, PAYMENT_ID, ID_MAX]


# --- Notices ----------------------------------------------------------------------------------------------------------


def test_a_notice_of_a_payment_is_a_capture() -> None:
    raw = signed_form(TOLD)
    assert captured_by(read_notice(raw, KEYS), raw) == Capture(
        provider="alipay",
        event_id=TOLD["notify_id"],
        merchant_id=f"{APP_ID}/{SELLER_ID}",
        payment_id=PAYMENT_ID,
        trade_no=TOLD["trade_no"],
        amount_minor=8_880,
        currency="CNY",
        captured_us=1_795_262_887 * US_PER_S,
        raw=raw,
    )


def test_the_end_of_the_time_for_refunds_is_a_capture_too() -> None:
    assert told(trade_status="TRADE_FINISHED") is not None
    assert told(refund_fee="0.00", gmt_refund="", gmt_close="2026-11-21 20:08:06") is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"trade_status": "WAIT_BUYER_PAY", "gmt_payment": ""},
        {"trade_status": "TRADE_CLOSED", "gmt_payment": ""},
        {"trade_status": "TRADE_CLOSED", "refund_fee": "88.80", "gmt_refund": "2026-11-21 21:00:00.123"},
        {"refund_fee": "0.01", "gmt_refund": "2026-11-21 21:00:00.123", "out_biz_no": "7"},
        {"gmt_refund": "2026-11-21 21:00:00.123"},
        {"refund_fee": "0.01"},
        {"trade_status": "WHATEVER"},
    ],
)
def test_waiting_closing_and_refunding_are_no_captures(changes: dict[str, str]) -> None:
    assert told(**changes) is None


def test_what_does_not_fit_is_told_as_it_stands() -> None:
    facts = [
        told(total_amount="0.01"),
        told(seller_id="2088000000000000"),
        told(app_id="2014072300000000"),
        told(out_trade_no="0719141034-6418"),
        told(trans_currency="USD"),
    ]
    assert [
        each and (each.amount_minor, each.merchant_id == f"{APP_ID}/{SELLER_ID}", each.payment_id, each.currency)
        for each in facts
    ] == [
        (1, True, PAYMENT_ID, "CNY"),
        (8_880, False, PAYMENT_ID, "CNY"),
        (8_880, False, PAYMENT_ID, "CNY"),
        (8_880, True, 0, "CNY"),
        (8_880, True, PAYMENT_ID, "USD"),
    ]


@pytest.mark.parametrize("name", sorted({*TOLD, "sign"}))
def test_each_parameter_is_signed(name: str) -> None:
    raw = signed_form(TOLD).decode()
    changed = "&".join(f"{part}1" if part.startswith(f"{name}=") else part for part in raw.split("&"))
    assert changed != raw
    with pytest.raises(ForgedNotice, match="signature"):
        read_notice(changed.encode(), KEYS)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no form",
        b'{"notify_id": "1"}',
        b"a=\xff",
        b"a=%FF",
        signed_form(TOLD) + b"&total_amount=0.01",
        b"total_amount=0.01&" + signed_form(TOLD),
        signed_form(TOLD) + b"&extra=1",
        signed_form(TOLD, APP_PRIVATE),
        urlencode(TOLD).encode(),
        urlencode({**TOLD, "sign": "", "sign_type": "RSA2"}).encode(),
        signed_form({**TOLD, "sign_type": "RSA"}),
        signed_form(TOLD).replace(b"sign_type=RSA2", b"sign_type=MD5"),
        b"&".join(b"a%d=1" % number for number in range(101)),
    ],
)
def test_what_alipay_did_not_sign_is_forged(raw: bytes) -> None:
    with pytest.raises(ForgedNotice):
        read_notice(raw, KEYS)


@pytest.mark.parametrize(
    "changes",
    [
        {"notify_id": ""},
        {"notify_id": "a b"},
        {"notify_id": "a" * 129},
        {"trade_no": ""},
        {"trade_no": "买"},
        {"trade_no": "1" * 129},
        {"total_amount": "88.801"},
        {"total_amount": ""},
        {"gmt_payment": ""},
        {"gmt_payment": "21.11.2026"},
        {"trans_currency": "yuan"},
        {"refund_fee": "some"},
    ],
)
def test_genuine_notices_that_make_no_sense_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ForgedNotice, match="malformed"):
        told(**changes)


@steady
@given(st.binary(max_size=300))
def test_no_bytes_are_taken_for_a_notice(raw: bytes) -> None:
    with pytest.raises(ForgedNotice):
        read_notice(raw, KEYS)


# --- Answers ----------------------------------------------------------------------------------------------------------


def signed(content: str) -> str:
    return str(sign_with_rsa2(bare(ALIPAY_PRIVATE), content, "utf-8"))


def answered(content: str, signature: str | None = None) -> bytes:
    signature = signed(content) if signature is None else signature
    return f'{{"alipay_trade_query_response":{content},"sign":"{signature}"}}'.encode()


def test_answers_are_verified_as_they_stand() -> None:
    # Spaces, the order of fields, escapes and numbers would all be lost if the object were written anew.
    content = '{ "msg":"\\u4e1a\\/务","code" : "10000","total_amount":88.80, "b": {"sign":"x","}":"]"},"trade_no":"7"}'
    answer, raw = read_answer(answered(content), QUERY, KEYS)
    assert raw == content.encode()
    assert (answer.code, answer.msg, answer.trade_no, answer.total_amount) == ("10000", "业/务", "7", Decimal("88.80"))
    assert answer.total_amount is not None
    assert fen(str(answer.total_amount)) == 8_880


def test_the_signature_may_stand_first_and_among_others() -> None:
    content = '{"code":"10000"}'
    body = f'{{"sign":"{signed(content)}", "alipay_trade_query_response": {content} ,"alipay_cert_sn":"1"}}'
    assert read_answer(body.encode(), QUERY, KEYS)[0].succeeded


def test_a_signature_from_before_slashes_were_escaped_counts() -> None:
    content = '{"code":"10000","bill_download_url":"http:\\/\\/alipay.example\\/bill"}'
    answer, raw = read_answer(answered(content, signed(content.replace("\\/", "/"))), QUERY, KEYS)
    assert answer.bill_download_url == "http://alipay.example/bill"
    assert b"\\/" not in raw


OBJECT = '{"code":"10000","trade_status":"TRADE_SUCCESS"}'
PAIR: dict[str, Any] = {"alipay_trade_query_response": json.loads(OBJECT), "sign": signed(OBJECT)}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"{}",
        b"[" * 5_000,
        answered(OBJECT)[:-1],
        answered(OBJECT, ""),
        answered(OBJECT, signed(OBJECT + " ")),
        answered(OBJECT.replace("10000", "10001"), signed(OBJECT)),
        answered(OBJECT).replace(b"alipay_trade_query_response", b"alipay_trade_close_response"),
        answered(OBJECT).replace(b"alipay_trade_query_response", b"error_response"),
        answered('{"msg":"no code"}'),
        answered('{"code":10000}'),
        answered('["10000"]'),
        answered('{"code":"10000","total_amount":"many"}'),
        json.dumps({**PAIR, "sign": 7}).encode(),
        json.dumps({"alipay_trade_query_response": PAIR["alipay_trade_query_response"]}).encode(),
        answered(OBJECT).replace(b"}", b',"alipay_trade_query_response":{"code":"10000"}}', 2),
        answered('{"code":"10000","msg":"业务"}').decode().encode("gbk"),
    ],
)
def test_answers_that_alipay_did_not_sign_say_nothing(body: bytes) -> None:
    with pytest.raises(Unverified):
        read_answer(body, QUERY, KEYS)


def test_of_two_objects_of_one_name_only_a_signed_one_is_read() -> None:
    forged = '{"code":"10000","trade_status":"TRADE_CLOSED"}'
    twice = (
        f'{{"alipay_trade_query_response":{forged},"alipay_trade_query_response":{OBJECT},"sign":"{signed(OBJECT)}"}}'
    )
    assert read_answer(twice.encode(), QUERY, KEYS)[0].trade_status == "TRADE_SUCCESS"
    twice = (
        f'{{"alipay_trade_query_response":{OBJECT},"alipay_trade_query_response":{forged},"sign":"{signed(OBJECT)}"}}'
    )
    with pytest.raises(Unverified):
        read_answer(twice.encode(), QUERY, KEYS)
