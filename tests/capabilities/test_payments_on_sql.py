"""Rows G8, G9, H20, H26, H27, H28 and H43 of the capability table, checked as they stand there, on SQL."""
# ruff: noqa: N802  # the rows keep their names

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from holdfast import observe
from holdfast.audit import audit
from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock, SystemClock, rfc3339
from holdfast.edge.http.app import build_app
from holdfast.edge.server import listening_on
from holdfast.errors import Unavailable
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderDue
from holdfast.services.orders.model import OrderStatus, OrderView
from holdfast.services.payments import actions, store
from holdfast.services.payments.model import PaymentOrder, Verdict
from holdfast.services.payments.needs import ForgedNotice
from holdfast.services.payments.sandbox import SIGNATURE_HEADER, asked_of
from holdfast.services.payments.service import UnknownProvider
from holdfast.services.stock.model import DEDUCTED
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.edge import counter as edge
from tests.edge.counter import facing, refused, settings_on
from tests.edge.provider import asking, provider_at
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    becomes,
    change,
    clean_in_time,
    count,
    deliver,
    detail_states,
    drained,
    in_time,
    level,
    level_becomes,
    one_by_one,
    order,
    pay_at_sandbox,
    rows,
    signed_notice,
    status,
    stock_up,
    two_systems,
)

PAY_ORDER_FIELDS = {
    *("id", "bizOrderNo", "payOrderNo", "bizUserId", "payChannelCode", "amount", "payType", "status", "expandJson"),
    *("resultCode", "resultMsg", "paySuccessTime", "payOverTime", "qrCodeUrl", "createTime", "updateTime"),
}


def counted(verdict: Verdict) -> float:
    """How many notices of a verdict this process has counted."""
    labels = {"provider": "sandbox", "verdict": verdict.value}
    return observe.registry.get_sample_value("holdfast_payment_notices_total", labels) or 0.0


async def became(system: System, clock: ManualClock, view: OrderView, wanted: OrderStatus, buyer: str = "ann") -> None:
    """Let the shop's clock run until the order is in that state."""

    async def reached() -> bool:
        return await status(system, view, buyer) is wanted

    await in_time(clock, reached, f"{buyer}'s order becomes {wanted}", within_s=300)


async def test_G8_close_trade_at_provider(start_system: StartSystem, settings: Settings) -> None:
    clock = ManualClock(NOON_US)
    async with provider_at(clock) as desk:
        system = await start_system(asking(settings, desk.url, poll_ms=3_600_000), clock=clock)
        await stock_up(system, "SKU-1", 4)
        closed, never, paid, unknown = [await order(system, buyer) for buyer in ("ann", "bob", "cid", "dan")]
        await desk.faults(noticeCopies=0)
        await desk.server.book.close(asked_of(await payment_of(system, closed)))  # closed there already
        await desk.pay(paid.payment.pay_url)  # and its notice is lost
        await system.orders.get(int(never.id), "bob")  # never opened: the provider knows of no such trade

        clock.advance(60)

        await became(system, clock, closed, OrderStatus.CLOSED, "ann")
        await became(system, clock, never, OrderStatus.CLOSED, "bob")
        await became(system, clock, paid, OrderStatus.PAID, "cid")
        await became(system, clock, unknown, OrderStatus.CLOSED, "dan")
        for view in (never, unknown):
            page = await desk.pay(view.payment.pay_url)
            assert "nothing was charged" in page
        await level_becomes(system, available=3, held=0, sold=1)
        await clean_in_time(system, clock)


async def test_G8_an_unknown_answer_leaves_the_order_open_and_is_asked_for_again(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = ManualClock(NOON_US)
    async with provider_at(clock) as desk:
        system = await start_system(asking(settings, desk.url), work=False, clock=clock)
        await stock_up(system, "SKU-1", 2)
        unpaid, paid = await order(system, "ann"), await order(system, "bob")
        await desk.faults(noticeCopies=0, answersLost=["close"])
        await desk.pay(paid.payment.pay_url)
        clock.advance(61)

        for _ in range(3):
            assert await system.orders.sweep(0) == 2
            assert await status(system, unpaid) is OrderStatus.PENDING_PAYMENT
            assert await status(system, paid, "bob") is OrderStatus.PENDING_PAYMENT
        with pytest.raises(Unavailable):
            await system.orders.cancel(int(unpaid.id), "ann")

        await desk.faults(noticeCopies=0)
        await system.orders.sweep(0)
        assert await status(system, unpaid) is OrderStatus.CLOSED  # the lost answers had closed it there already
        await system.payments.poll(0)
        assert await status(system, paid, "bob") is OrderStatus.PAID


async def test_G9_pay_success(start_system: StartSystem) -> None:
    system = await start_system()
    await stock_up(system, "SKU-1", 5)
    view = await order(system, quantity=2)
    notice = await pay_at_sandbox(system, view)

    told = [await deliver(system, notice) for _ in range(5)]

    assert told == [Verdict.APPLIED] * 5
    await becomes(system, view, OrderStatus.PAID)
    await level_becomes(system, available=3, held=0, sold=2)
    assert await detail_states(system, view.id) == [DEDUCTED]
    assert await count(system, "SELECT id FROM payment_order WHERE status = 3") == 1
    assert await count(system, "SELECT event_id FROM payment_notice") == 1
    assert await count(system, "SELECT id FROM stock_ledger WHERE kind = 'deduct'") == 1
    (kept,) = await rows(system, "SELECT raw FROM payment_notice")
    assert bytes(kept["raw"]).decode() == notice.body


async def test_G9_a_forged_notice_changes_nothing(start_system: StartSystem) -> None:
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    notice = await pay_at_sandbox(system, view)
    richer = notice.body.replace(view.payment.id, str(int(view.payment.id) + 1))
    for body, signature in ((richer, notice.signature), (notice.body, notice.signature[:-1] + "g"), (notice.body, "")):
        with pytest.raises(ForgedNotice):
            await system.payments.notice("sandbox", {SIGNATURE_HEADER: signature}, body.encode())
    with pytest.raises(ForgedNotice):  # no database stores it
        await deliver(system, signed_notice(system, view, system.clock.now_us(), merchant_id="holdfast\0demo"))
    with pytest.raises(UnknownProvider):
        await system.payments.notice("stranger", {SIGNATURE_HEADER: notice.signature}, notice.body.encode())
    assert await count(system, "SELECT event_id FROM payment_notice") == 0
    assert await status(system, view) is OrderStatus.PENDING_PAYMENT


@pytest.mark.parametrize(
    "wrong", [{"amount_minor": PRICE_MINOR - 1}, {"currency": "EUR"}, {"merchant_id": "another"}], ids=str
)
async def test_G9_a_notice_with_wrong_facts_is_parked_with_an_alarm(
    start_system: StartSystem, wrong: dict[str, Any]
) -> None:
    system = await start_system()
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    before = counted(Verdict.WRONG_FACTS)

    assert await deliver(system, signed_notice(system, view, system.clock.now_us(), **wrong)) is Verdict.WRONG_FACTS

    assert counted(Verdict.WRONG_FACTS) == before + 1
    report = await audit(system.database, system.clock, 0)
    (finding,) = [each for each in report.findings if each.name == "money.notices"]
    assert finding.rows[0]["payment_id"] == int(view.payment.id)
    assert await status(system, view) is OrderStatus.PENDING_PAYMENT
    assert await count(system, "SELECT id FROM payment_order WHERE captured_minor > 0") == 0


async def test_G9_a_hundred_notices_at_once_have_one_effect(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, one_by_one(settings))
    system = systems[0]
    await stock_up(system, "SKU-1", 3)
    view = await order(system)
    notice = await pay_at_sandbox(system, view)

    told = await asyncio.gather(*(deliver(systems[number % len(systems)], notice) for number in range(100)))

    assert Counter(told) == {Verdict.APPLIED: 100}
    await level_becomes(system, available=2, held=0, sold=1)
    assert await count(system, "SELECT event_id FROM payment_notice") == 1
    assert await count(system, "SELECT id FROM order_log WHERE to_status = 'paid'") == 1
    assert await count(system, "SELECT id FROM payment_refund") == 0


async def test_G9_a_notice_that_comes_before_its_payment_order_is_applied_when_that_appears(
    start_system: StartSystem,
) -> None:
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    payment = await hidden(system, view)
    before = counted(Verdict.UNKNOWN_PAYMENT)

    for _ in range(2):
        notice = signed_notice(system, view, system.clock.now_us(), event_id="early")
        assert await deliver(system, notice) is Verdict.UNKNOWN_PAYMENT
    assert await system.payments.sweep(0) == 0  # nothing can be said of it yet
    assert counted(Verdict.UNKNOWN_PAYMENT) == before + 1
    (finding,) = [each for each in (await audit(system.database, system.clock, 0)).findings if "notices" in each.name]
    assert finding.rows[0]["event_id"] == "early"

    async with system.database.transaction() as tx:
        await store.insert_payments.many(tx, [payment])
    assert await system.payments.sweep(0) == 1

    (kept,) = await rows(system, "SELECT verdict FROM payment_notice")
    assert kept["verdict"] == "applied"
    assert await system.payments.poll(0) == 1
    assert await status(system, view) is OrderStatus.PAID


async def test_G9_a_notice_whose_judging_fails_is_kept_and_judged_again(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    notice = await pay_at_sandbox(system, view)

    def broken(*_: object) -> Verdict:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(actions, "judge", broken)
        assert await deliver(system, notice) is Verdict.RECEIVED
        assert await deliver(system, notice) is Verdict.RECEIVED
        await system.payments.sweep(0)  # fails again, and is not the end of it
    (kept,) = await rows(system, "SELECT verdict, raw FROM payment_notice")
    assert (kept["verdict"], bytes(kept["raw"]).decode()) == ("received", notice.body)

    await system.payments.sweep(0)

    (kept,) = await rows(system, "SELECT verdict FROM payment_notice")
    assert kept["verdict"] == "applied"
    assert await count(system, "SELECT id FROM payment_order WHERE status = 3") == 1


async def guarded(system: System, clock: ManualClock) -> None:
    """Start the sweepers, and no listener: every message is lost. Then let one period of asking providers pass."""
    for sweeper in system.sweepers:
        sweeper.start()
    await asyncio.sleep(0)  # they begin to wait
    clock.advance(system.settings.payments.poll_ms / 1_000)


async def test_H20_reconcile_job(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(work=False, clock=clock)
    await stock_up(system, "SKU-1", 30)
    buyers = [f"buyer-{number}" for number in range(10)]
    views = [await order(system, buyer) for buyer in buyers]
    unpaid = await order(system, "nobody")
    for view, buyer in zip(views, buyers, strict=True):
        await pay_at_sandbox(system, view)  # and every notice is lost
        assert await status(system, view, buyer) is OrderStatus.PENDING_PAYMENT
    clock.advance(1)

    await guarded(system, clock)

    async def all_paid() -> bool:
        return {await status(system, view, buyer) for view, buyer in zip(views, buyers, strict=True)} == {
            OrderStatus.PAID
        }

    await eventually(all_paid, "within one period every paid order is paid")
    assert await status(system, unpaid, "nobody") is OrderStatus.PENDING_PAYMENT

    async def all_sold() -> bool:
        return (await level(system)).sold == 10

    await in_time(clock, all_sold, "their units are sold")


async def test_H20_an_order_whose_messages_are_lost_is_paid_within_one_period(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(work=False, clock=clock)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    await deliver(system, await pay_at_sandbox(system, view))
    assert await status(system, view) is OrderStatus.PENDING_PAYMENT

    await guarded(system, clock)

    async def paid() -> bool:
        return await status(system, view) is OrderStatus.PAID

    await eventually(paid, "the order is paid")


async def test_H20_money_that_came_too_late_is_not_taken_for_the_order(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    notice = signed_notice(system, view, NOON_US + 61 * US_PER_S)
    clock.advance(30)
    await deliver(system, notice)
    await system.payments.poll(0)
    assert await status(system, view) is OrderStatus.CLOSED

    async def refunded() -> bool:
        return await count(system, "SELECT id FROM payment_order WHERE refunded_minor = captured_minor") == 1

    await in_time(clock, refunded, "the money is given back")
    assert await count(system, "SELECT id FROM payment_refund") == 1


async def test_H26_pay_order_query_api(
    start_system: StartSystem, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(settings_on(settings.database.url), work=False, clock=clock)
    await stock_up(system, "SKU-1", 2)
    view = await order(system, quantity=2)
    async with facing_in_real_time(system) as counter:

        async def asked(who: dict[str, str], order_id: str = view.id) -> httpx.Response:
            return await counter.ask("GET", f"/pay-orders/biz/{order_id}", who)

        ann, staff = counter.bearer("ann"), counter.bearer("boss", "orders:read")
        waiting = (await asked(ann)).json()
        assert set(waiting) == PAY_ORDER_FIELDS | {"currency"}
        assert waiting == {
            "id": view.payment.id,
            "bizOrderNo": view.id,
            "payOrderNo": view.payment.id,
            "bizUserId": "ann",
            "payChannelCode": "sandbox",
            "amount": 2 * PRICE_MINOR,
            "currency": "CNY",
            "payType": 1,
            "status": 1,
            "expandJson": None,
            "resultCode": None,
            "resultMsg": None,
            "paySuccessTime": None,
            "payOverTime": view.pay_by,
            "qrCodeUrl": view.payment.pay_url,
            "createTime": rfc3339(NOON_US),
            "updateTime": rfc3339(NOON_US),
        }
        assert (await asked(staff)).json() == waiting

        clock.advance(5)
        await deliver(system, await pay_at_sandbox(system, view))
        paid = (await asked(ann)).json()
        then = rfc3339(NOON_US + 5 * US_PER_S)
        assert (paid["status"], paid["resultCode"], paid["qrCodeUrl"]) == (3, "SUCCESS", None)
        assert (paid["paySuccessTime"], paid["updateTime"]) == (then, then)
        assert msgspec.json.decode(paid["expandJson"])["tradeNo"].startswith("sb")

        for who, order_id in ((ann, "77"), (ann, "no-id"), (staff, "77"), (counter.bearer("bob"), view.id)):
            refused(await asked(who, order_id), 404, "payment_not_found")
        refused(await asked({}), 401, "unauthorized")

        async def away(*_: object) -> None:
            raise Unavailable("the database is away")

        monkeypatch.setattr(store, "details", away)
        refused(await asked(ann), 503, "unavailable")


async def test_H27_client_fallback(start_system: StartSystem, settings: Settings, tmp_path: Path) -> None:
    clock = ManualClock(NOON_US)
    book_url = f"sqlite:///{tmp_path}/book.db"
    async with provider_at(clock, book_url=book_url) as desk:
        url, port = desk.url, int(desk.url.rsplit(":", 1)[1])
        system = await start_system(asking(settings, url), clock=clock)
        await stock_up(system, "SKU-1", 2)
        unpaid, paid = await order(system, "ann"), await order(system, "bob")
        await desk.faults(noticeCopies=0)
        await desk.pay(paid.payment.pay_url)

    clock.advance(60)  # the provider is away at the deadline
    for _ in range(5):
        clock.advance(1)
        await system.orders.sweep(0)
        await system.payments.poll(0)
    assert await status(system, unpaid) is OrderStatus.PENDING_PAYMENT
    assert await status(system, paid, "bob") is OrderStatus.PENDING_PAYMENT
    assert (await level(system)).held == 2

    async with provider_at(clock, port=port, book_url=book_url):
        await became(system, clock, unpaid, OrderStatus.CLOSED)
        await became(system, clock, paid, OrderStatus.PAID, "bob")
        await level_becomes(system, available=1, held=0, sold=1)
        await clean_in_time(system, clock)


async def test_H28_delay_listener_branches(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 3)
    done, captured, unpaid = [await order(system, buyer) for buyer in ("ann", "bob", "cid")]
    await deliver(system, await pay_at_sandbox(system, done))
    await becomes(system, done, OrderStatus.PAID)
    await pay_at_sandbox(system, captured)  # its notice is lost
    before = await rows(system, "SELECT * FROM order_log WHERE order_id = :id", id=int(done.id))

    # An order that is not there, one that waits no more, one that is paid at the provider, one that nobody paid.
    for order_id in (77, int(done.id)):
        body = OrderDue(order_id=order_id)
        await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_DUE, body)

    async def stopped() -> bool:
        return await drained(system, topology.ORDER_DUE_QUEUE)

    await eventually(stopped, "the messages are handled")
    clock.advance(60)
    await became(system, clock, captured, OrderStatus.PAID, "bob")
    await became(system, clock, unpaid, OrderStatus.CLOSED, "cid")
    assert await rows(system, "SELECT * FROM order_log WHERE order_id = :id", id=int(done.id)) == before
    await level_becomes(system, available=1, held=0, sold=2)
    assert await count(system, "SELECT id FROM payment_refund") == 0


async def test_H43_payer_sees_paid(start_system: StartSystem, settings: Settings) -> None:
    system = await start_system(settings_on(settings.database.url), work=False)  # no message is handled
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    async with facing(system) as counter:

        async def seen() -> Any:
            answer = await counter.ask("GET", f"/v1/orders/{view.id}", counter.bearer("ann"))
            assert answer.status_code == 200
            return answer.json()

        before = await seen()
        assert before["status"] == "pending_payment"
        await deliver(system, await pay_at_sandbox(system, view))

        confirming = await seen()
        assert confirming["status"] == "confirming"
        assert confirming["payment"]["payUrl"] is None
        assert confirming == before | {"status": "confirming", "payment": before["payment"] | {"payUrl": None}}

        system.work()
        await becomes(system, view, OrderStatus.PAID)
        assert (await seen())["status"] == "paid"


@asynccontextmanager
async def facing_in_real_time(system: System) -> AsyncIterator[edge.Counter]:
    """Serve a system whose clock stands still."""
    app = build_app(system)
    async with (
        listening_on(app, system.settings.http, SystemClock(), 1) as url,
        httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client,
    ):
        yield edge.Counter(system, url, client)


async def payment_of(system: System, view: OrderView) -> PaymentOrder:
    """An order's payment order."""
    async with system.database.read() as tx:
        payment = await store.by_id(tx, int(view.payment.id))
    assert payment is not None
    return payment


async def hidden(system: System, view: OrderView) -> dict[str, Any]:
    """Take an order's payment order away; answers its row."""
    (row,) = await rows(system, "SELECT * FROM payment_order WHERE order_id = :order_id", order_id=int(view.id))
    await change(system, "DELETE FROM payment_order WHERE order_id = :order_id", order_id=int(view.id))
    return row
