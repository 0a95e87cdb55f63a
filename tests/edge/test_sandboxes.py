"""One suite for both sandboxes, the one within the shop and the server of its own; then what only the server does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import date
from typing import NamedTuple

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import ManualClock, SystemClock
from holdfast.errors import Unavailable
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.orders.model import OrderStatus, OrderView
from holdfast.services.payments import store
from holdfast.services.payments.model import PaymentOrder
from holdfast.services.payments.needs import Provider, RefundEnd
from holdfast.services.payments.sandbox_book import TradeClosed
from holdfast.services.payments.sandbox_remote import SandboxRemote
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.edge.counter import facing
from tests.edge.provider import ProviderDesk, asking, provider_at
from tests.shop import NOON_US, becomes, count, order, pay_at_sandbox, rows, stock_up, token_of

DAY = date(2027, 1, 15)  # of NOON_US
DAY_S = 86_400


class Shop(NamedTuple):
    """A shop without workers, its provider, and how a buyer pays there."""

    system: System
    clock: ManualClock
    provider: Provider
    pay: Callable[[OrderView], Awaitable[bool]]


@pytest.fixture(params=["within the shop", "a server of its own"])
async def shop(request: pytest.FixtureRequest, start_system: StartSystem, settings: Settings) -> AsyncIterator[Shop]:
    clock = ManualClock(NOON_US)
    async with AsyncExitStack() as stack:
        if request.param == "within the shop":
            system = await start_system(work=False, clock=clock)

            async def pay(view: OrderView) -> bool:
                try:
                    await pay_at_sandbox(system, view)
                except TradeClosed:
                    return False
                return True
        else:
            desk = await stack.enter_async_context(provider_at(clock))
            # A manual clock does not end a call, and none is to be lost here.
            system = await start_system(asking(settings, desk.url, call_timeout_ms=10_000), work=False, clock=clock)

            async def pay(view: OrderView) -> bool:
                return "Paid" in await desk.pay(view.payment.pay_url)

        await stock_up(system, "SKU-1", 10)
        yield Shop(system, clock, system.providers["sandbox"], pay)


async def payment_of(system: System, view: OrderView) -> PaymentOrder:
    async with system.database.read() as tx:
        payment = await store.by_id(tx, int(view.payment.id))
    assert payment is not None
    return payment


async def test_a_trade_is_open_until_it_is_paid_and_then_says_what_was_captured(shop: Shop) -> None:
    view = await order(shop.system)
    payment = await payment_of(shop.system, view)
    assert (await shop.provider.query(payment)).end is TradeEnd.OPEN

    shop.clock.advance(1.0)
    assert await shop.pay(view)

    asked, closed = await shop.provider.query(payment), await shop.provider.close(payment)
    assert asked == closed
    assert asked.end is TradeEnd.PAID
    assert asked.capture is not None
    assert asked.capture.payment_id == payment.id
    assert (asked.capture.amount_minor, asked.capture.currency) == (payment.amount_minor, payment.currency)
    assert asked.capture.merchant_id == shop.provider.merchant_id
    assert asked.capture.captured_us == NOON_US + 1_000_000


async def test_a_closed_trade_cannot_be_paid(shop: Shop) -> None:
    view = await order(shop.system)
    payment = await payment_of(shop.system, view)
    for _ in range(2):
        assert (await shop.provider.close(payment)).end is TradeEnd.CLOSED
    assert not await shop.pay(view)
    assert (await shop.provider.query(payment)).end is TradeEnd.CLOSED


async def test_nothing_is_paid_after_the_time_to_pay(shop: Shop) -> None:
    view = await order(shop.system)
    shop.clock.advance(60.0)
    assert not await shop.pay(view)
    assert (await shop.provider.query(await payment_of(shop.system, view))).end is TradeEnd.OPEN


async def test_a_refund_happens_once_for_each_id_and_never_exceeds_what_was_captured(shop: Shop) -> None:
    view = await order(shop.system)
    payment = await payment_of(shop.system, view)
    assert await shop.pay(view)
    half = payment.amount_minor // 2

    for _ in range(2):
        assert (await shop.provider.refund(payment, 1, half)).end is RefundEnd.DONE
    other = await shop.provider.refund(payment, 1, half + 1)
    assert (other.end, bool(other.reason)) == (RefundEnd.REFUSED, True)
    assert (await shop.provider.refund(payment, 2, payment.amount_minor)).end is RefundEnd.REFUSED
    assert (await shop.provider.refund(payment, 3, payment.amount_minor - half)).end is RefundEnd.DONE
    assert (await shop.provider.refund(payment, 4, 1)).end is RefundEnd.REFUSED


async def test_the_statement_has_every_movement_of_its_day_and_none_of_another(shop: Shop) -> None:
    view = await order(shop.system)
    payment = await payment_of(shop.system, view)
    assert await shop.pay(view)
    shop.clock.advance(1.0)
    await shop.provider.refund(payment, 7, 300)
    with pytest.raises(Unavailable):
        await shop.provider.statement(DAY)

    shop.clock.advance(2 * DAY_S)

    lines = await shop.provider.statement(DAY)
    told = [(line.kind, line.refund_id, line.amount_minor, line.currency, line.at_us - NOON_US) for line in lines]
    assert told == [("capture", None, payment.amount_minor, "CNY", 0), ("refund", 7, 300, "CNY", 1_000_000)]
    assert {line.payment_id for line in lines} == {payment.id}
    assert list(await shop.provider.statement(DAY.replace(day=16))) == []


# --- The server ------------------------------------------------------------------------------------------------------


class Sale(NamedTuple):
    """A served shop with its workers, and its provider in a server of its own."""

    system: System
    desk: ProviderDesk


@pytest.fixture
async def sale(start_system: StartSystem, settings: Settings) -> AsyncIterator[Sale]:
    async with provider_at(SystemClock()) as desk:
        system = await start_system(asking(settings, desk.url))
        await stock_up(system, "SKU-1", 10)
        async with facing(system) as counter:
            desk.server.notify_url = f"{counter.url}/v1/notices/sandbox"
            yield Sale(system, desk)


async def verdicts(system: System) -> list[str]:
    return [row["verdict"] for row in await rows(system, "SELECT verdict FROM payment_notice ORDER BY received_us")]


async def test_the_notice_of_the_pay_page_pays_the_order(sale: Sale) -> None:
    view = await order(sale.system)
    page = await sale.desk.client.get(view.payment.pay_url or "")
    assert page.headers["content-type"].startswith("text/html")
    assert "10.00 CNY" in page.text
    assert "<button>Pay</button>" in page.text
    paid = await sale.desk.pay(view.payment.pay_url)
    assert "<button>" not in paid
    await becomes(sale.system, view, OrderStatus.PAID)
    assert await verdicts(sale.system) == ["applied"]


@pytest.mark.parametrize("faults", [{"noticeCopies": 2}, {"noticeDelayMs": 200}])
async def test_notices_that_come_twice_or_late_pay_once(sale: Sale, faults: dict[str, int]) -> None:
    view = await order(sale.system)
    await sale.desk.faults(**faults)
    await sale.desk.pay(view.payment.pay_url)
    await becomes(sale.system, view, OrderStatus.PAID)
    assert await verdicts(sale.system) == ["applied"]


async def test_notices_out_of_order_reach_their_orders(sale: Sale) -> None:
    views = [await order(sale.system, buyer) for buyer in ("ann", "bob", "cid")]
    await sale.desk.faults(noticeHeld=3)
    for view in views:
        assert await verdicts(sale.system) == []
        await sale.desk.pay(view.payment.pay_url)
    for view, buyer in zip(views, ("ann", "bob", "cid"), strict=True):
        await becomes(sale.system, view, OrderStatus.PAID, buyer)
    told = await rows(sale.system, "SELECT payment_id FROM payment_notice ORDER BY received_us, event_id")
    assert {row["payment_id"] for row in told} == {int(view.payment.id) for view in views}


@pytest.mark.parametrize("faults", [{"noticeCopies": 0}, {"noticeForged": True}])
async def test_a_lost_or_forged_notice_is_found_by_asking(sale: Sale, faults: dict[str, object]) -> None:
    view = await order(sale.system)
    await sale.desk.faults(**faults)
    await sale.desk.pay(view.payment.pay_url)
    assert await sale.system.payments.poll(0) == 1
    assert (await sale.system.orders.get(int(view.id), "ann")).status is OrderStatus.PAID
    (kept,) = await rows(sale.system, "SELECT event_id, verdict FROM payment_notice")
    assert kept["event_id"].startswith("query-")
    assert kept["verdict"] == "applied"


async def test_a_lost_answer_to_a_refund_is_unknown_and_its_repetition_refunds_nothing_more(sale: Sale) -> None:
    view = await order(sale.system)
    payment = await payment_of(sale.system, view)
    await sale.desk.faults(noticeCopies=0, answersLost=["refund"])
    await sale.desk.pay(view.payment.pay_url)
    provider = sale.system.providers["sandbox"]
    assert (await provider.refund(payment, 1, payment.amount_minor)).end is RefundEnd.UNKNOWN
    await sale.desk.faults(noticeCopies=0)
    assert (await provider.refund(payment, 1, payment.amount_minor)).end is RefundEnd.DONE
    assert (await provider.refund(payment, 2, 1)).end is RefundEnd.REFUSED


async def test_an_answer_that_is_an_error_or_not_signed_is_unknown(sale: Sale, monkeypatch: pytest.MonkeyPatch) -> None:
    view = await order(sale.system)
    payment = await payment_of(sale.system, view)
    provider = sale.system.providers["sandbox"]
    await sale.desk.faults(queryUnknown=True)
    assert (await provider.query(payment)).end is TradeEnd.UNKNOWN
    await sale.desk.faults()
    assert (await provider.query(payment)).end is TradeEnd.OPEN
    stranger = SandboxRemote(sale.desk.url, sale.system.clock, "another-secret-of-16", "holdfast-demo", 300_000, 300)
    assert (await stranger.query(payment)).end is TradeEnd.UNKNOWN  # neither believes the other
    assert (await stranger.close(payment)).end is TradeEnd.UNKNOWN
    await stranger.aclose()
    sign = sale.desk.server.signing.signature
    with monkeypatch.context() as patch:
        patch.setattr(sale.desk.server.signing, "signature", lambda content: sign(content + b" "))
        assert (await provider.query(payment)).end is TradeEnd.UNKNOWN
        with pytest.raises(Unavailable):
            await provider.statement(DAY)
    assert (await provider.query(payment)).end is TradeEnd.OPEN


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"noticeCopies": -1}', b'{"unknown": 1}', b'{"answersLost": ["x"]}']
)
async def test_what_is_no_order_for_faults_is_refused(sale: Sale, body: bytes) -> None:
    answer = await sale.desk.client.post("/control/faults", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")


@pytest.mark.parametrize("verb", ["query", "close", "refund", "statement"])
async def test_nobody_without_the_secret_asks_the_server_anything(sale: Sale, verb: str) -> None:
    view = await order(sale.system)
    body = msgspec.json.encode({"paymentId": int(view.payment.id), "amountMinor": 1, "currency": "CNY"})
    for headers in ({}, {"sandbox-signature": f"t=1800000000,v1={'0' * 64}"}):
        answer = await sale.desk.client.post(f"/api/{verb}", content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "forged_notice")
    forged = (view.payment.pay_url or "")[:-1] + "x"
    assert (await sale.desk.client.post(forged)).status_code == 400
    assert (await sale.system.providers["sandbox"].query(await payment_of(sale.system, view))).end is TradeEnd.OPEN


async def test_a_notice_is_sent_again_until_it_is_taken(sale: Sale) -> None:
    view = await order(sale.system)
    taken, sale.desk.server.notify_url = sale.desk.server.notify_url, f"{sale.desk.url}/nowhere"
    await sale.desk.pay(view.payment.pay_url)
    assert await count(sale.system, "SELECT event_id FROM payment_notice") == 0
    sale.desk.server.notify_url = taken
    await becomes(sale.system, view, OrderStatus.PAID)


async def test_a_shop_that_asks_a_server_has_no_pay_link_of_its_own(sale: Sale) -> None:
    view = await order(sale.system)
    async with facing(sale.system) as counter:
        answer = await counter.ask("POST", f"/sandbox/pay/{token_of(view)}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_provider")
