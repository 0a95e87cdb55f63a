"""Rows G8, G9 and K19 of the capability table with Alipay as the provider, on SQL: a shop, its buyers, a gateway."""
# ruff: noqa: N802  # the rows keep their names

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from urllib.parse import parse_qsl

import msgspec
import pytest
from structlog.testing import capture_logs

from holdfast.bootstrap import System
from holdfast.clock import ManualClock, SystemClock
from holdfast.errors import InvalidInput, InvalidSettings
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.orders.model import OrderStatus, OrderView
from holdfast.services.payments.alipay import CLOSE, QUERY, REFUND
from holdfast.services.payments.model import Verdict
from holdfast.services.payments.needs import ForgedNotice
from holdfast.services.stock.model import Sku
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.edge.counter import facing, settings_on
from tests.servers.alipay import Gateway, PageDead, failure, serving, settings_of, signed_form
from tests.servers.alipay_keys import APP_PRIVATE
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    becomes,
    clean,
    clean_in_time,
    count,
    deafen_feed,
    level,
    order,
    rows,
    status,
    stock_up,
)
from tests.shop import wish as wish_of

TIME_OUT_S = 60.0
FORM = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON_US)


@pytest.fixture
def gateway(clock: ManualClock) -> Iterator[Gateway]:
    with serving(Gateway(clock)) as served:
        yield served


@pytest.fixture
def settings(database_url: str, gateway: Gateway) -> Settings:
    return msgspec.structs.replace(settings_on(database_url), payments=settings_of(gateway.url))


@pytest.fixture
async def shop(start_system: StartSystem, clock: ManualClock) -> System:
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 100)
    await deafen_feed(system)
    return system


def link_of(view: OrderView) -> str:
    assert view.payment.pay_url is not None
    return view.payment.pay_url


class TestOverHttp:
    """With the machine's clock: a server waits by it."""

    @pytest.fixture
    def clock(self) -> SystemClock:
        return SystemClock()

    async def test_G9_pay_success_at_alipay(self, shop: System, gateway: Gateway) -> None:
        view = await order(shop)
        assert dict(parse_qsl(link_of(view)))["version"] == "1.0"
        notice = gateway.pay(link_of(view))
        async with facing(shop) as counter:
            answers = await asyncio.gather(
                *(counter.ask("POST", "/v1/notices/alipay", FORM, content=notice) for _ in range(5))
            )
            assert [(each.status_code, each.content) for each in answers] == [(200, b"success")] * 5
            await becomes(shop, view, OrderStatus.PAID)
            again = gateway.notice(view.payment.id)  # the same trade under another event id
            finished = gateway.notice(view.payment.id, trade_status="TRADE_FINISHED")
            for raw in (again, finished):
                assert (await counter.ask("POST", "/v1/notices/alipay", FORM, content=raw)).content == b"success"

        await clean(shop)
        assert await rows(shop, "SELECT captured_minor, provider FROM payment_order") == [
            {"captured_minor": PRICE_MINOR, "provider": "alipay"}
        ]
        after = await level(shop)
        assert (after.available, after.held, after.sold) == (99, 0, 1)
        assert await rows(shop, "SELECT verdict FROM payment_notice ORDER BY verdict") == [
            {"verdict": "applied"},
            {"verdict": "repeated"},
            {"verdict": "repeated"},
        ]

    async def test_G9_a_bad_signature_is_rejected_and_changes_nothing(self, shop: System, gateway: Gateway) -> None:
        view = await order(shop)
        notice = gateway.pay(link_of(view))
        async with facing(shop) as counter, counter.unchanged():
            for raw in (
                notice.replace(b"10.00", b"10.01"),
                signed_form(gateway.notice_params(view.payment.id), APP_PRIVATE),
                notice + b"&a=b",
                b"",
            ):
                answer = await counter.ask("POST", "/v1/notices/alipay", FORM, content=raw)
                assert answer.status_code >= 400
                assert answer.json()["code"] == "forged_notice"
                with pytest.raises(ForgedNotice):
                    await shop.payments.notice("alipay", {}, raw)
        assert await status(shop, view) is OrderStatus.PENDING_PAYMENT

    async def test_G9_notices_of_no_captured_money_change_nothing(self, shop: System, gateway: Gateway) -> None:
        view = await order(shop)
        gateway.open_page(link_of(view))
        async with facing(shop) as counter, counter.unchanged():
            for changes in ({}, {"trade_status": "TRADE_CLOSED"}):
                raw = gateway.notice(view.payment.id, **changes)
                assert (await counter.ask("POST", "/v1/notices/alipay", FORM, content=raw)).content == b"success"
        assert await status(shop, view) is OrderStatus.PENDING_PAYMENT


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"total_amount": "0.01"}, Verdict.WRONG_FACTS),
        ({"seller_id": "2088000000000001"}, Verdict.WRONG_FACTS),
        ({"app_id": "2014072300007149"}, Verdict.WRONG_FACTS),
        ({"out_trade_no": "7"}, Verdict.UNKNOWN_PAYMENT),
        ({"out_trade_no": "of-another-shop"}, Verdict.UNKNOWN_PAYMENT),
    ],
)
async def test_G9_wrong_facts_are_kept_with_an_alarm(
    shop: System, gateway: Gateway, changes: dict[str, str], verdict: Verdict
) -> None:
    view = await order(shop)
    gateway.pay(link_of(view))
    raw = gateway.notice(view.payment.id, **changes)
    with capture_logs() as logs:
        assert await shop.payments.notice("alipay", {}, raw) is verdict
    assert [entry["log_level"] for entry in logs if entry["event"] == "notice_parked"] == ["error"]
    assert await rows(shop, "SELECT verdict, raw FROM payment_notice") == [{"verdict": verdict.value, "raw": raw}]
    assert await status(shop, view) is OrderStatus.PENDING_PAYMENT
    assert await rows(shop, "SELECT captured_minor FROM payment_order") == [{"captured_minor": 0}]


async def test_G8_close_trade_at_alipay(shop: System, gateway: Gateway, clock: ManualClock) -> None:
    never_opened = await order(shop, "ann")
    waiting = await order(shop, "bob")
    paid = await order(shop, "cid")
    gateway.open_page(link_of(waiting))
    gateway.pay(link_of(paid))  # its notice is lost

    clock.advance(TIME_OUT_S)

    await becomes(shop, never_opened, OrderStatus.CLOSED, "ann")
    await becomes(shop, waiting, OrderStatus.CLOSED, "bob")
    await becomes(shop, paid, OrderStatus.PAID, "cid")
    assert gateway.trades[waiting.payment.id]["status"] == "TRADE_CLOSED"
    for view in (never_opened, waiting):
        with pytest.raises(PageDead):
            gateway.pay(link_of(view))
    await clean_in_time(shop, clock)


async def test_G8_unknown_is_asked_again_until_it_is_known(shop: System, gateway: Gateway, clock: ManualClock) -> None:
    view = await order(shop)
    gateway.pay(link_of(view))
    gateway.instead = {CLOSE: failure("ACQ.SYSTEM_ERROR"), QUERY: failure("ACQ.SYSTEM_ERROR")}
    clock.advance(TIME_OUT_S)

    async def asked_again() -> bool:
        clock.advance(1)
        return gateway.count(CLOSE) >= 3

    await eventually(asked_again, "closing is asked for again")
    assert await status(shop, view) is OrderStatus.PENDING_PAYMENT
    assert await shop.payments.settle_before_close(int(view.id)) is TradeEnd.UNKNOWN
    gateway.instead = {}

    async def settled() -> bool:
        clock.advance(1)
        return await status(shop, view) is OrderStatus.PAID

    await eventually(settled, "the order is paid")
    await clean_in_time(shop, clock)


async def test_K19_paying_and_cancelling_collide(shop: System, gateway: Gateway, clock: ManualClock) -> None:
    """The buyer's page was open; cancelling and paying meet at the gateway and at our door, in any order."""
    chance = random.Random(19)
    views = await asyncio.gather(*(order(shop, f"buyer-{number}") for number in range(30)))

    async def pays(view: OrderView) -> None:
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        try:
            notice = gateway.pay(link_of(view))
        except PageDead:
            return
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        await shop.payments.notice("alipay", {}, notice)

    async def cancels(view: OrderView, buyer: str) -> None:
        await asyncio.gather(shop.orders.cancel(int(view.id), buyer), return_exceptions=True)

    await asyncio.gather(
        *(pays(view) for view in views), *(cancels(view, f"buyer-{number}") for number, view in enumerate(views))
    )
    await clean_in_time(shop, clock)

    paid = [
        view for number, view in enumerate(views) if await status(shop, view, f"buyer-{number}") is OrderStatus.PAID
    ]
    captured = {number for number, trade in gateway.trades.items() if "paid_at" in trade}
    given_back = {number for number, _ in gateway.refunds}
    assert given_back == captured - {view.payment.id for view in paid}
    assert len(gateway.refunds) == len(given_back)
    assert (await level(shop)).sold == len(paid)


async def test_money_that_comes_after_the_end_is_given_back_once(
    shop: System, gateway: Gateway, clock: ManualClock
) -> None:
    view = await order(shop)
    link = link_of(view)
    await shop.orders.cancel(int(view.id), "ann")  # nobody opened the page yet, so Alipay knows of no trade
    await becomes(shop, view, OrderStatus.CANCELLED)
    gateway.instead[REFUND] = failure("ACQ.SYSTEM_ERROR")
    await shop.payments.notice("alipay", {}, gateway.pay(link))

    async def asked_twice() -> bool:
        clock.advance(1)
        return gateway.count(REFUND) >= 2

    await eventually(asked_twice, "the refund is asked for again")
    assert gateway.refunds == {}
    gateway.instead = {}

    async def refunded() -> bool:
        clock.advance(1)
        return await count(shop, "SELECT id FROM payment_order WHERE refunded_minor = captured_minor") == 1

    await eventually(refunded, "the refund is booked")
    assert list(gateway.refunds.values()) == ["10.00"]
    assert await shop.payments.notice("alipay", {}, gateway.notice(view.payment.id)) is None  # the refund's own notice
    await clean_in_time(shop, clock)


async def test_orders_in_another_currency_are_refused_and_their_neighbours_are_not(shop: System) -> None:
    await stock_up(shop, "SKU-EUR", 5)
    await shop.stock.keep_sku(Sku(sku="SKU-EUR", title="Dear", price_minor=PRICE_MINOR, currency="EUR"))
    placed = [order(shop, f"buyer-{number}") for number in range(5)]
    refused, *views = await asyncio.gather(
        shop.orders.place(wish_of("eve", "SKU-EUR")), *placed, return_exceptions=True
    )
    assert isinstance(refused, InvalidInput)
    assert "CNY only" in refused.detail
    assert all(isinstance(view, OrderView) for view in views)
    assert (await level(shop, "SKU-EUR")).held == 0


async def test_settings_of_alipay_are_checked_at_the_start(
    start_system: StartSystem, settings: Settings, gateway: Gateway
) -> None:
    lacking = msgspec.structs.replace(settings, payments=settings_of(gateway.url, alipay_app_id=""))
    with pytest.raises(InvalidSettings, match="HOLDFAST_PAYMENTS__ALIPAY_APP_ID"):
        await start_system(lacking)
    hasty = msgspec.structs.replace(settings, orders=msgspec.structs.replace(settings.orders, time_out_ms=1_000))
    with pytest.raises(InvalidSettings, match="1 minute to 15 days"):
        await start_system(hasty)
    chosen = msgspec.structs.replace(settings, payments=settings_of(gateway.url, provider="sandbox"))
    with pytest.raises(InvalidSettings, match="configured: alipay"):
        await start_system(chosen)
