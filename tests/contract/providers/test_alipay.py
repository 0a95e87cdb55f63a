"""The Alipay provider against a gateway that checks and signs by Alipay's own library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any
from urllib.parse import parse_qsl, urlencode

import httpx
import msgspec
import pytest
from alipay.aop.api import DefaultAlipayClient as DefaultAlipayClientModule
from alipay.aop.api.AlipayClientConfig import AlipayClientConfig
from alipay.aop.api.DefaultAlipayClient import DefaultAlipayClient
from alipay.aop.api.domain.AlipayTradePagePayModel import AlipayTradePagePayModel
from alipay.aop.api.domain.AlipayTradeQueryModel import AlipayTradeQueryModel
from alipay.aop.api.request.AlipayTradePagePayRequest import AlipayTradePagePayRequest
from alipay.aop.api.request.AlipayTradeQueryRequest import AlipayTradeQueryRequest
from structlog.testing import capture_logs

from holdfast.clock import US_PER_S, ManualClock
from holdfast.errors import InvalidInput, Unavailable
from holdfast.ids import IdSource
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments.alipay import CLOSE, QUERY, REFUND, REFUND_QUERY, STATEMENT, Alipay, open_alipay
from holdfast.services.payments.alipay_wire import instant_us
from holdfast.services.payments.model import WAITING, PaymentOrder, Verdict, judge
from holdfast.services.payments.needs import Provider, RefundAnswer, RefundEnd, TradeAnswer
from holdfast.settings import PaymentsSettings
from tests.servers.alipay import (
    APP_ID,
    NOTIFY_URL,
    RETURN_URL,
    SELLER_ID,
    Gateway,
    PageDead,
    account_of,
    bare,
    bill_line,
    bill_of,
    failure,
    serving,
    settings_of,
    success,
)
from tests.servers.alipay_keys import ALIPAY_PUBLIC, APP_PRIVATE

NOON_US = instant_us("2026-11-21 12:00:00")
TO_PAY_US = 1_800 * US_PER_S
UNKNOWN = TradeAnswer(end=TradeEnd.UNKNOWN)

Garble = Callable[[bytes], tuple[int, bytes]]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON_US)


@pytest.fixture
def gateway(clock: ManualClock) -> Iterator[Gateway]:
    with serving(Gateway(clock)) as served:
        yield served


@pytest.fixture
async def alipay(gateway: Gateway, clock: ManualClock) -> AsyncIterator[Alipay]:
    async with opened(settings_of(gateway.url), 1_800_000, clock) as provider:
        yield provider


@asynccontextmanager
async def opened(settings: PaymentsSettings, time_out_ms: int, clock: ManualClock) -> AsyncIterator[Alipay]:
    provider = open_alipay(settings, time_out_ms, clock)
    yield provider
    await provider.aclose()


@asynccontextmanager
async def hurried(gateway: Gateway, clock: ManualClock) -> AsyncIterator[Alipay]:
    """The provider with hardly any patience."""
    async with httpx.AsyncClient(trust_env=False) as client:
        yield Alipay(account_of(gateway.url, timeout_ms=200), clock, client)


@pytest.fixture
def payment(clock: ManualClock) -> PaymentOrder:
    return PaymentOrder(
        id=IdSource(clock).next(),
        order_id=42,
        buyer="ann",
        provider="alipay",
        amount_minor=8_880,
        currency="CNY",
        status=WAITING,
        trade_no=None,
        captured_minor=0,
        refunded_minor=0,
        captured_us=None,
        pay_by_us=NOON_US + TO_PAY_US,
    )


def verdict_of(alipay: Alipay, payment: PaymentOrder, raw: bytes) -> Verdict | None:
    capture = alipay.verify_notice({}, raw)
    return None if capture is None else judge(capture, payment, alipay.merchant_id)


def other_signature(gateway: Gateway, method: str) -> Garble:
    """The same answer, signed by somebody else."""

    def sign(raw: bytes) -> tuple[int, bytes]:
        found = json.loads(raw)[f"{method.replace('.', '_')}_response"]
        return 200, gateway.signed_answer(method, found, APP_PRIVATE)

    return sign


def unsigned(raw: bytes) -> tuple[int, bytes]:
    return 200, raw.partition(b',"sign"')[0] + b"}"


def broken(_: bytes) -> tuple[int, bytes]:
    return 502, b"<html>Bad Gateway</html>"


def huge(raw: bytes) -> tuple[int, bytes]:
    return 200, raw + b" " * 2_000_000


def cut(raw: bytes) -> tuple[int, bytes]:
    return 200, raw[:-20]


NO_ANSWER: list[Garble] = [unsigned, broken, huge, cut]
NO_WORD = [
    {"code": "20000", "msg": "Service Currently Unavailable", "sub_code": "isp.unknow-error"},
    {"code": "40002", "msg": "Invalid Arguments", "sub_code": "isv.invalid-signature"},
    {"code": "40006", "msg": "Insufficient Permissions", "sub_code": "isv.insufficient-isv-permissions"},
    failure("ACQ.SYSTEM_ERROR"),
    failure("AQC.SYSTEM_ERROR"),
    failure(""),
    failure("ACQ.SOMETHING_NEW"),
    {"code": "10003", "msg": "order success pay inprocess"},
]


def test_it_keeps_the_protocol(alipay: Alipay) -> None:
    provider: Provider = alipay
    assert (provider.name, provider.merchant_id, provider.notice_answer) == (
        "alipay",
        f"{APP_ID}/{SELLER_ID}",
        b"success",
    )


# --- Paying -----------------------------------------------------------------------------------------------------------


def test_the_pay_link_is_what_alipays_own_library_makes(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder
) -> None:
    ours = dict(parse_qsl(alipay.pay_url(payment).partition("?")[2]))
    business = json.loads(ours["biz_content"])
    model = AlipayTradePagePayModel.from_alipay_dict(business)
    request = AlipayTradePagePayRequest(biz_model=model)
    request.notify_url, request.return_url = NOTIFY_URL, RETURN_URL
    theirs = dict(parse_qsl(client_of(gateway).page_execute(request, http_method="GET").partition("?")[2]))

    assert json.loads(theirs["biz_content"]) == business
    assert set(theirs) == set(ours)
    same = set(ours) - {"timestamp", "biz_content", "sign", "format"}
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
    assert theirs["format"].upper() == ours["format"]
    assert business == {
        "out_trade_no": str(payment.id),
        "product_code": "FAST_INSTANT_TRADE_PAY",
        "total_amount": "88.80",
        "subject": "Order 42",
        "time_expire": "2026-11-21 12:30:00",
    }


def client_of(gateway: Gateway) -> DefaultAlipayClient:
    """Alipay's own client."""
    config = AlipayClientConfig()
    config.server_url, config.app_id = gateway.url, APP_ID
    config.app_private_key, config.alipay_public_key = bare(APP_PRIVATE), bare(ALIPAY_PUBLIC)
    config.format, config.timeout = "JSON", 10
    return DefaultAlipayClient(config)


async def test_alipays_own_client_takes_the_gateway_for_alipay(
    gateway: Gateway, alipay: Alipay, payment: PaymentOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post(url: str, query: str, headers: dict[str, str], params: dict[str, str], *_: object) -> bytes:
        return httpx.post(f"{url}?{query}", content=urlencode(params), headers=headers, trust_env=False).content

    monkeypatch.setattr(DefaultAlipayClientModule, "do_post", post)  # its own cannot reach a port
    gateway.pay(alipay.pay_url(payment))
    model = AlipayTradeQueryModel()
    model.out_trade_no = str(payment.id)
    found = json.loads(await asyncio.to_thread(client_of(gateway).execute, AlipayTradeQueryRequest(biz_model=model)))
    assert (found["code"], found["trade_status"], found["total_amount"]) == ("10000", "TRADE_SUCCESS", "88.80")


def test_the_pay_link_is_the_same_whenever_it_is_made(
    alipay: Alipay, clock: ManualClock, payment: PaymentOrder
) -> None:
    first = alipay.pay_url(payment)
    clock.advance(1_000)
    assert alipay.pay_url(payment) == first
    assert dict(parse_qsl(first))["timestamp"] == "2026-11-21 12:00:00"


def test_the_pay_link_dies_at_the_deadline(
    alipay: Alipay, gateway: Gateway, clock: ManualClock, payment: PaymentOrder
) -> None:
    odd = msgspec.structs.replace(payment, pay_by_us=payment.pay_by_us + 999_999)
    clock.advance(1_799)
    gateway.open_page(alipay.pay_url(odd))
    clock.advance(1)
    with pytest.raises(PageDead):
        gateway.open_page(alipay.pay_url(odd))


@pytest.mark.parametrize(
    ("currency", "amount_minor", "told"),
    [("USD", 100, "CNY only"), ("CNY", 0, "0.01 to 100000000.00"), ("CNY", 10_000_000_001, "0.01 to 100000000.00")],
)
def test_what_alipay_cannot_take_is_refused_at_opening(
    alipay: Alipay, payment: PaymentOrder, currency: str, amount_minor: int, told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        alipay.pay_url(msgspec.structs.replace(payment, currency=currency, amount_minor=amount_minor))


# --- Notices ----------------------------------------------------------------------------------------------------------


def test_a_notice_pays(alipay: Alipay, gateway: Gateway, clock: ManualClock, payment: PaymentOrder) -> None:
    clock.advance(60.5)
    raw = gateway.pay(alipay.pay_url(payment))
    capture = alipay.verify_notice({}, raw)
    assert capture is not None
    assert capture.captured_us == NOON_US + 60 * US_PER_S
    assert capture.trade_no == gateway.trades[str(payment.id)]["trade_no"]
    assert verdict_of(alipay, payment, raw) is Verdict.APPLIED


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"total_amount": "88.79"}, Verdict.WRONG_FACTS),
        ({"total_amount": "88.81"}, Verdict.WRONG_FACTS),
        ({"total_amount": "8880"}, Verdict.WRONG_FACTS),
        ({"seller_id": "2088000000000001"}, Verdict.WRONG_FACTS),
        ({"app_id": "2014072300007149"}, Verdict.WRONG_FACTS),
        ({"app_id": SELLER_ID, "seller_id": APP_ID}, Verdict.WRONG_FACTS),
        ({"trans_currency": "USD"}, Verdict.WRONG_FACTS),
        ({"trade_status": "TRADE_FINISHED"}, Verdict.APPLIED),
        ({"trade_status": "WAIT_BUYER_PAY"}, None),
        ({"trade_status": "TRADE_CLOSED"}, None),
        ({"refund_fee": "88.80", "gmt_refund": "2026-11-21 12:10:00.000", "out_biz_no": "7"}, None),
    ],
)
def test_what_a_genuine_notice_means(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder, changes: dict[str, str], verdict: Verdict | None
) -> None:
    gateway.pay(alipay.pay_url(payment))
    assert verdict_of(alipay, payment, gateway.notice(str(payment.id), **changes)) is verdict


# --- Asking and closing -----------------------------------------------------------------------------------------------


async def test_asking_changes_nothing(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    assert (await alipay.query(payment)).end is TradeEnd.OPEN  # nobody opened the page yet, but somebody can
    gateway.open_page(alipay.pay_url(payment))
    assert (await alipay.query(payment)).end is TradeEnd.OPEN
    gateway.pay(alipay.pay_url(payment))
    paid = await alipay.query(payment)
    assert paid.end is TradeEnd.PAID
    assert paid.capture is not None
    assert judge(paid.capture, payment, alipay.merchant_id) is Verdict.APPLIED
    assert paid.capture.captured_us == NOON_US
    assert b"TRADE_SUCCESS" in paid.capture.raw
    assert await alipay.query(payment) == paid  # asked twice, it is one event
    assert {method for method, _ in gateway.asked} == {QUERY}


async def test_closing_what_nobody_opened(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    assert await alipay.close(payment) == TradeAnswer(end=TradeEnd.CLOSED)
    assert [method for method, _ in gateway.asked] == [CLOSE]


async def test_closing_what_waits(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    link = alipay.pay_url(payment)
    gateway.open_page(link)
    assert await alipay.close(payment) == TradeAnswer(end=TradeEnd.CLOSED)
    with pytest.raises(PageDead):
        gateway.pay(link)
    assert await alipay.close(payment) == TradeAnswer(end=TradeEnd.CLOSED)  # again does no harm
    assert (await alipay.query(payment)).end is TradeEnd.CLOSED


@pytest.mark.parametrize(
    "sub_code", ["ACQ.TRADE_HAS_SUCCESS", "ACQ.TRADE_STATUS_ERROR", "ACQ.REASON_TRADE_STATUS_INVALID"]
)
async def test_closing_what_is_paid(alipay: Alipay, gateway: Gateway, payment: PaymentOrder, sub_code: str) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.instead[CLOSE] = failure(sub_code)
    answer = await alipay.close(payment)
    assert answer.end is TradeEnd.PAID
    assert answer.capture is not None
    assert judge(answer.capture, payment, alipay.merchant_id) is Verdict.APPLIED


async def test_closing_and_paying_at_once_has_one_outcome(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder
) -> None:
    """The buyer opens the page and pays between the gateway's no and our next question."""
    gateway.after[CLOSE] = lambda: gateway.pay(alipay.pay_url(payment))
    assert (await alipay.close(payment)).end is TradeEnd.CLOSED  # true when it was said
    # What is paid then comes in as any late payment does, and closing again says so.
    assert (await alipay.close(payment)).end is TradeEnd.PAID


@pytest.mark.parametrize("found", [success(trade_status="WAIT_BUYER_PAY"), failure("ACQ.TRADE_NOT_EXIST"), *NO_WORD])
async def test_a_no_to_closing_alone_says_nothing(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder, found: dict[str, Any]
) -> None:
    gateway.instead[CLOSE] = failure("ACQ.TRADE_STATUS_ERROR")
    gateway.instead[QUERY] = {**found, "out_trade_no": str(payment.id)}
    assert await alipay.close(payment) == UNKNOWN


@pytest.mark.parametrize("found", NO_WORD)
async def test_what_is_no_word_of_the_trade_is_unknown(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder, found: dict[str, Any]
) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.instead = {CLOSE: found, QUERY: found, REFUND: found, REFUND_QUERY: found}
    assert await alipay.query(payment) == UNKNOWN
    assert await alipay.close(payment) == UNKNOWN
    assert (await alipay.refund(payment, 7, 8_880)).end is RefundEnd.UNKNOWN


@pytest.mark.parametrize("garble", [*NO_ANSWER, None])
async def test_an_answer_that_alipay_did_not_sign_is_unknown(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder, garble: Garble | None
) -> None:
    gateway.pay(alipay.pay_url(payment))
    for method in (QUERY, CLOSE, REFUND, REFUND_QUERY):
        gateway.raw_answers[method] = garble or other_signature(gateway, method)
    assert await alipay.query(payment) == UNKNOWN
    assert await alipay.close(payment) == UNKNOWN
    assert await alipay.refund(payment, 7, 8_880) == RefundAnswer(end=RefundEnd.UNKNOWN)


@pytest.mark.parametrize(
    "changes",
    [
        {"out_trade_no": "7"},
        {"out_trade_no": ""},
        {"trade_status": "TRADE_PENDING"},
        {"trade_status": ""},
        {"send_pay_date": ""},
        {"trade_no": ""},
        {"total_amount": "1e3"},
    ],
)
async def test_an_answer_about_something_else_is_unknown(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder, changes: dict[str, str]
) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.instead[QUERY] = {**gateway._query({"out_trade_no": str(payment.id)}), **changes}
    assert await alipay.query(payment) == UNKNOWN


async def test_a_swapped_amount_is_told_and_refused(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.trades[str(payment.id)]["total_amount"] = "0.01"
    answer = await alipay.close(payment)
    assert answer.end is TradeEnd.PAID
    assert answer.capture is not None
    assert judge(answer.capture, payment, alipay.merchant_id) is Verdict.WRONG_FACTS


async def test_amounts_may_come_as_numbers(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.instead[QUERY] = {**gateway._query({"out_trade_no": str(payment.id)}), "total_amount": 88.8}
    answer = await alipay.query(payment)
    assert answer.capture is not None
    assert answer.capture.amount_minor == 8_880


async def test_a_gateway_that_is_silent_is_unknown_in_time(
    gateway: Gateway, clock: ManualClock, payment: PaymentOrder
) -> None:
    async with hurried(gateway, clock) as alipay:
        gateway.pay(alipay.pay_url(payment))
        gateway.silent = {QUERY, CLOSE, REFUND}
        async with asyncio.timeout(5):
            assert await alipay.query(payment) == UNKNOWN
            assert await alipay.close(payment) == UNKNOWN
            assert await alipay.refund(payment, 7, 8_880) == RefundAnswer(end=RefundEnd.UNKNOWN)


async def test_a_gateway_that_is_away_is_unknown(clock: ManualClock, payment: PaymentOrder) -> None:
    with serving(Gateway(clock)) as gateway:
        url = gateway.url
    async with opened(settings_of(url), 1_800_000, clock) as alipay:
        assert await alipay.query(payment) == UNKNOWN
        assert await alipay.close(payment) == UNKNOWN
        assert await alipay.refund(payment, 7, 1) == RefundAnswer(end=RefundEnd.UNKNOWN)
        clock.advance(86_400)
        with pytest.raises(Unavailable):
            await alipay.statement(date(2026, 11, 20))


# --- Refunds ----------------------------------------------------------------------------------------------------------


async def test_a_refund_is_made_once_for_each_id(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    gateway.pay(alipay.pay_url(payment))
    for _ in range(3):
        assert await alipay.refund(payment, 7, 1_000) == RefundAnswer(end=RefundEnd.DONE)
    assert await alipay.refund(payment, 8, 7_880) == RefundAnswer(end=RefundEnd.DONE)
    assert gateway.refunds == {(str(payment.id), "7"): "10.00", (str(payment.id), "8"): "78.80"}
    assert gateway.count(REFUND_QUERY) == 2  # the repetitions moved no money, so they were asked about
    assert await alipay.refund(payment, 8, 7_880) == RefundAnswer(end=RefundEnd.DONE)  # the trade is closed by now


async def test_a_refund_whose_answer_was_lost_is_found(
    gateway: Gateway, clock: ManualClock, alipay: Alipay, payment: PaymentOrder
) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.silent = {REFUND}
    async with hurried(gateway, clock) as impatient:
        assert await impatient.refund(payment, 7, 8_880) == RefundAnswer(end=RefundEnd.UNKNOWN)
    gateway.silent = set()
    assert await alipay.refund(payment, 7, 8_880) == RefundAnswer(end=RefundEnd.DONE)
    assert gateway.refunds == {(str(payment.id), "7"): "88.80"}


@pytest.mark.parametrize(
    "found",
    [
        success(),
        success(refund_status="REFUND_PROCESSING"),
        success(refund_status="REFUND_SUCCESS", refund_amount="8.00"),
        success(refund_status="REFUND_SUCCESS", refund_amount="88.80", out_request_no="8"),
        success(refund_status="REFUND_SUCCESS"),
        *NO_WORD,
    ],
)
async def test_no_change_of_funds_alone_is_unknown(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder, found: dict[str, Any]
) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.instead[REFUND] = success(out_trade_no=str(payment.id), fund_change="N")
    gateway.instead[REFUND_QUERY] = {"out_trade_no": str(payment.id), "out_request_no": "7", **found}
    assert (await alipay.refund(payment, 7, 8_880)).end is RefundEnd.UNKNOWN


async def test_a_refund_that_can_never_be_made_is_refused(
    alipay: Alipay, gateway: Gateway, payment: PaymentOrder
) -> None:
    assert await alipay.refund(payment, 7, 8_880) == RefundAnswer(end=RefundEnd.REFUSED, reason="ACQ.TRADE_NOT_EXIST")
    gateway.pay(alipay.pay_url(payment))
    gateway.instead[REFUND] = failure("ACQ.TRADE_HAS_FINISHED")
    refused = RefundAnswer(end=RefundEnd.REFUSED, reason="ACQ.TRADE_HAS_FINISHED")
    assert await alipay.refund(payment, 7, 8_880) == refused
    gateway.instead[REFUND_QUERY] = failure("ACQ.SYSTEM_ERROR")
    assert (await alipay.refund(payment, 7, 8_880)).end is RefundEnd.UNKNOWN
    del gateway.instead[REFUND_QUERY]
    gateway.refunds[str(payment.id), "7"] = "88.80"  # an earlier call made it after all
    assert await alipay.refund(payment, 7, 8_880) == RefundAnswer(end=RefundEnd.DONE)


async def test_a_merchant_without_money_is_asked_again(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    gateway.pay(alipay.pay_url(payment))
    gateway.instead[REFUND] = failure("ACQ.SELLER_BALANCE_NOT_ENOUGH")
    answer = await alipay.refund(payment, 7, 8_880)
    assert answer == RefundAnswer(end=RefundEnd.UNKNOWN, reason="ACQ.SELLER_BALANCE_NOT_ENOUGH")


# --- Statements -------------------------------------------------------------------------------------------------------

DAY = date(2026, 11, 20)
LINE = bill_line("2026112022001400000001", "262144000000000007", "交易", "88.80", "2026-11-20 10:00:07")


async def test_a_statement_is_fetched(alipay: Alipay, gateway: Gateway) -> None:
    gateway.bills[DAY.isoformat()] = bill_of(LINE, trades=1, refunds=0)
    (line,) = await alipay.statement(DAY)
    assert (line.payment_id, line.kind, line.amount_minor) == (262144000000000007, "capture", 8_880)


async def test_a_day_that_has_not_ended_in_beijing_is_not_asked_about(
    alipay: Alipay, gateway: Gateway, clock: ManualClock
) -> None:
    with pytest.raises(Unavailable, match="has not ended"):
        await alipay.statement(date(2026, 11, 21))
    clock.advance(12 * 3_600)  # midnight in Beijing
    with pytest.raises(Unavailable, match="bill_not_exist"):
        await alipay.statement(date(2026, 11, 21))
    assert gateway.count(STATEMENT) == 1


async def test_no_statement_of_a_day_long_over_means_no_movements(alipay: Alipay, clock: ManualClock) -> None:
    with pytest.raises(Unavailable, match="bill_not_exist"):
        await alipay.statement(DAY)
    clock.advance(12 * 3_600)
    assert await alipay.statement(DAY) == ()


async def test_a_statement_at_no_address_is_unavailable(alipay: Alipay, gateway: Gateway) -> None:
    for url in ("http://[", "no address", "http://127.0.0.1:1/bill", ""):
        gateway.instead[STATEMENT] = success(bill_download_url=url)
        with pytest.raises(Unavailable):
            await alipay.statement(DAY)


@pytest.mark.parametrize("bill", [None, b"", b"no zip", bill_of(LINE, trades=2, refunds=0)])
async def test_a_statement_that_cannot_be_read_is_unavailable(
    alipay: Alipay, gateway: Gateway, bill: bytes | None
) -> None:
    if bill is None:
        gateway.instead[STATEMENT] = success(bill_download_url=gateway.url.replace("gateway.do", "bill/none"))
    else:
        gateway.bills[DAY.isoformat()] = bill
    with pytest.raises(Unavailable):
        await alipay.statement(DAY)


async def test_a_statement_is_fetched_over_https_where_the_gateway_is(clock: ManualClock) -> None:
    fetched = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            found = success(bill_download_url="http://dwbillcenter.alipay.com/downloadBillFile.resource?bizType=X")
            return httpx.Response(200, content=Gateway(clock).signed_answer(STATEMENT, found))
        fetched.append(str(request.url))
        return httpx.Response(200, content=bill_of(LINE, trades=1, refunds=0))

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        lines = await Alipay(account_of("https://openapi.alipay.com/gateway.do"), clock, client).statement(DAY)
    assert len(lines) == 1
    assert fetched == ["https://dwbillcenter.alipay.com/downloadBillFile.resource?bizType=X"]


# --- Secrets ----------------------------------------------------------------------------------------------------------


async def test_no_key_is_logged_or_shown(alipay: Alipay, gateway: Gateway, payment: PaymentOrder) -> None:
    with capture_logs() as logs:
        gateway.raw_answers = {QUERY: broken, CLOSE: unsigned}
        await alipay.query(payment)
        await alipay.close(payment)
        gateway.instead[REFUND] = failure("ACQ.SYSTEM_ERROR")
        await alipay.refund(payment, 7, 1)
    assert {entry["event"] for entry in logs} == {"no_answer", "answer_unclear"}
    shown = f"{logs!r} {vars(alipay)!r} {alipay!r}"
    assert bare(APP_PRIVATE)[:20] not in shown
    assert "BEGIN" not in shown
