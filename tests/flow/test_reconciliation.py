"""Reconciliation: what is broken by hand is found once, proposed, left alone by a dry run, mended by its repair."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from holdfast.audit import CHECKS
from holdfast.bootstrap import System
from holdfast.clock import ManualClock
from holdfast.errors import InvalidInput
from holdfast.reconciliation.model import (
    KINDS,
    PROVIDER_KINDS,
    DifferenceClosed,
    DifferenceNotFound,
    DifferenceView,
    NoSafeRepair,
    Repair,
    State,
)
from holdfast.reconciliation.repairs import Repairs
from holdfast.reconciliation.service import ReconciliationService
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderPaid
from holdfast.services.orders.model import OrderStatus, OrderView
from holdfast.services.payments.model import PaymentOrder, RefundStatus, RefundWish
from holdfast.services.payments.needs import RefundAnswer, RefundEnd
from holdfast.settings import ReconciliationSettings, Settings
from tests.conftest import StartSystem, eventually, with_orders
from tests.flow.test_audit import (  # noqa: F401  # facts is a fixture
    CORRUPTIONS,
    PARK,
    Facts,
    Inside,
    Undone,
    facts,
)
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    change,
    clean_in_time,
    count,
    deafen_feed,
    deliver,
    in_time,
    lose,
    order,
    pay,
    pay_at_sandbox,
    rows,
    signed_notice,
    status,
    stock_up,
    two_systems,
)

DAY_S = 86_400
LONG_MS = 10 * DAY_S * 1_000


class Broken:
    """A shop with one order, with listeners only when they are wanted, and never a sweeper."""

    def __init__(self, system: System, clock: ManualClock, view: OrderView, patch: pytest.MonkeyPatch) -> None:
        self.system = system
        self.clock = clock
        self.view = view
        self.patch = patch

    @property
    def payment_id(self) -> int:
        return int(self.view.payment.id)

    def listen(self, *names: str) -> None:
        """Start these listeners, or all."""
        for listen in self.system.listens:
            if not names or listen.name in names:
                self.system.listen(listen)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        await in_time(self.clock, condition, what)

    async def is_paid(self) -> bool:
        return await status(self.system, self.view) is OrderStatus.PAID

    async def run(self) -> list[DifferenceView]:
        await self.system.reconciliation.run("tests", "a look")
        return list(await self.system.reconciliation.list())

    async def refund(self) -> int:
        wish = RefundWish(key="key", actor="boss", reason="a test", payment_id=self.payment_id)
        return (await self.system.refunds.request(wish)).refund.id

    async def pages(self) -> list[dict[str, Any]]:
        """Everything that the shop knows, but for the tables of reconciliation."""
        kept = ("order_order", "order_log", "payment_order", "payment_refund", "stock_level", "stock_task_detail")
        found = []
        for name in (*kept, "hf_message", "hf_parked", "reconciliation_difference", "reconciliation_log"):
            found += await rows(self.system, f"SELECT * FROM {name} ORDER BY 1")
        return found


@pytest.fixture
async def shop(start_system: StartSystem, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Broken:
    clock = ManualClock(NOON_US)
    system = await start_system(with_orders(settings, time_out_ms=LONG_MS), clock=clock, work=False)
    await stock_up(system, "SKU-1", 10)
    await deafen_feed(system)
    view = await order(system, quantity=2)
    await lose(system, "stock.locked")  # the guard moves by itself when the clock does
    return Broken(system, clock, view, monkeypatch)


async def paid_but_held(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    shop.listen("orders.pay")
    await shop.until(shop.is_paid, "the order is paid")
    await shop.system.stop_work()
    assert await lose(shop.system, "order.paid") == 1
    shop.clock.advance(61)


async def cancelled_but_held(shop: Broken) -> None:
    await shop.system.orders.cancel(int(shop.view.id), "ann")
    assert await lose(shop.system, "order.closed") == 1
    shop.clock.advance(61)


async def overdue(shop: Broken) -> None:
    assert await lose(shop.system, "order.due") == 1
    shop.clock.advance(LONG_MS / 1_000 + 61)


async def unnoticed(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    assert await lose(shop.system, "payment.succeeded") == 1
    shop.clock.advance(61)


async def unaccepted(shop: Broken) -> None:
    await paid_but_held(shop)
    await change(shop.system, "UPDATE payment_order SET accepted_us = NULL")


async def kept_unrefunded(shop: Broken) -> None:
    notice = signed_notice(shop.system, shop.view, shop.clock.now_us())
    await shop.system.orders.cancel(int(shop.view.id), "ann")
    await deliver(shop.system, notice)
    assert await lose(shop.system, "payment.succeeded") == 1
    shop.clock.advance(61)


async def kept_refused(shop: Broken) -> None:
    async def refuse(payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        return RefundAnswer(end=RefundEnd.REFUSED, reason="the account is empty")

    with shop.patch.context() as patch:
        patch.setattr(shop.system.sandbox, "refund", refuse)
        notice = signed_notice(shop.system, shop.view, shop.clock.now_us())
        await shop.system.orders.cancel(int(shop.view.id), "ann")
        await deliver(shop.system, notice)
        shop.listen("orders.pay", "payments.refund")

        async def refused() -> bool:
            return await count(shop.system, "SELECT id FROM payment_refund WHERE status = 'refused'") == 1

        await shop.until(refused, "the provider refused")
        await shop.system.stop_work()
    shop.clock.advance(61)


async def refund_forgotten(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    await shop.refund()
    assert await lose(shop.system, "refund.due") == 1
    shop.clock.advance(61)


async def ghost(shop: Broken) -> None:
    for table, key in (
        *(("order_order", "id"), ("order_line", "order_id"), ("order_log", "order_id"), ("order_reply", "order_id")),
        ("payment_order", "order_id"),
    ):
        await change(shop.system, f"DELETE FROM {table} WHERE {key} = :id", id=int(shop.view.id))
    await lose(shop.system, "order.due")


async def parked(shop: Broken) -> None:
    await paid_but_held(shop)
    await lose(shop.system, "order.due")
    paid = OrderPaid(order_id=int(shop.view.id), payment_id=shop.payment_id)
    await shop.system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_PAID, paid)
    await change(shop.system, PARK, now=shop.clock.now_us())
    await lose(shop.system, "order.paid")


async def capture_lost(shop: Broken) -> None:
    await pay_at_sandbox(shop.system, shop.view)
    shop.clock.advance(DAY_S)


async def refund_done_at_provider(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    refund_id = await shop.refund()
    assert (await shop.system.refunds.get(refund_id)).status is RefundStatus.PENDING
    await _provider_refunds(shop, refund_id, 2 * PRICE_MINOR)
    assert await lose(shop.system, "refund.due") == 1
    shop.clock.advance(DAY_S)


async def refund_lost_at_provider(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    refund_id = await shop.refund()
    assert await shop.system.refunds.ask(refund_id) is RefundEnd.DONE
    await lose(shop.system, "refund.due")
    await change(shop.system, "DELETE FROM sandbox_refund")
    shop.clock.advance(2 * DAY_S)


async def _provider_refunds(shop: Broken, refund_id: int, amount_minor: int) -> None:
    found = await rows(shop.system, "SELECT trade_no, currency, changed_us FROM sandbox_trade")
    (trade,) = found
    await change(
        shop.system,
        """INSERT INTO sandbox_refund (refund_id, payment_id, trade_no, amount_minor, currency, changed_us)
           VALUES (:refund_id, :payment_id, :trade_no, :amount_minor, :currency, :now)""",
        refund_id=refund_id,
        payment_id=shop.payment_id,
        trade_no=trade["trade_no"],
        amount_minor=amount_minor,
        currency=trade["currency"],
        now=shop.clock.now_us(),
    )


MENDED: dict[str, tuple[Callable[[Broken], Awaitable[None]], str]] = {
    "paid but held": (paid_but_held, "stock.stranded"),
    "cancelled but held": (cancelled_but_held, "stock.stranded"),
    "overdue": (overdue, "orders.overdue"),
    "unnoticed": (unnoticed, "money.unnoticed"),
    "unaccepted": (unaccepted, "money.unaccepted"),
    "kept, no refund": (kept_unrefunded, "money.kept"),
    "kept, refund refused": (kept_refused, "money.kept"),
    "refund forgotten": (refund_forgotten, "money.refund_overdue"),
    "ghost": (ghost, "stock.ghost_holds"),
    "parked": (parked, "messages.parked"),
    "capture lost": (capture_lost, "provider.capture_not_booked"),
    "refund not booked": (refund_done_at_provider, "provider.refund_not_booked"),
    "refund missing": (refund_lost_at_provider, "provider.refund_missing"),
}


@pytest.mark.parametrize("name", MENDED)
async def test_what_is_broken_is_found_once_and_mended_by_its_repair(shop: Broken, name: str) -> None:
    breaks, kind = MENDED[name]
    await breaks(shop)
    desk = shop.system.reconciliation

    before = await shop.pages()
    seen = await desk.run("tests", "a look", dry_run=True)
    assert [each.id for each in seen.differences if each.kind == kind] == ["0"]
    assert await shop.pages() == before

    (first,) = [each for each in await shop.run() if each.kind == kind]
    (again,) = [each for each in await shop.run() if each.kind == kind]
    assert (first.id, first.first_seen_at) == (again.id, again.first_seen_at)
    assert (first.repair, bool(first.advice)) == (KINDS[kind].repair, True)

    before = await shop.pages()
    report = await desk.repair(int(first.id), "boss", "looking", dry_run=True)
    assert (report.dry_run, report.repair, report.state) == (True, first.repair, State.OPEN)
    assert await shop.pages() == before

    await desk.repair(int(first.id), "boss", "case 17")
    await lose(shop.system, "order.due")  # of an order that is paid or gone: nobody needs it here
    shop.listen()
    for other in [each for each in await shop.run() if each.kind != kind and each.repair]:
        with suppress(DifferenceClosed):
            await desk.repair(int(other.id), "boss", "what came with it")
    await clean_in_time(shop.system, shop.clock)

    # What the provider is asked for now stands in its statement of today, which is made when the day is over.
    shop.clock.advance(DAY_S if kind in PROVIDER_KINDS else 61)
    assert [each.kind for each in await shop.run()] == []
    assert (await desk.get(int(first.id))).state is State.REPAIRED
    deeds = [(each["action"], each["actor"], each["reason"]) for each in await desk.entries(int(first.id))]
    assert deeds == [("repair", "boss", "case 17")]
    with pytest.raises(DifferenceClosed):
        await desk.repair(int(first.id), "boss", "again")


async def capture_unknown(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    await change(shop.system, "UPDATE sandbox_trade SET payment_id = 77")
    shop.clock.advance(DAY_S)


async def capture_missing(shop: Broken) -> None:
    await deliver(shop.system, signed_notice(shop.system, shop.view, shop.clock.now_us()))
    shop.clock.advance(DAY_S)


async def amount_differs(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    await change(shop.system, "UPDATE sandbox_trade SET amount_minor = amount_minor - 1")
    shop.clock.advance(DAY_S)


async def refund_unknown(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    await _provider_refunds(shop, 77, PRICE_MINOR)
    shop.clock.advance(DAY_S)


async def refund_differs(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    await shop.system.refunds.ask(await shop.refund())
    await change(shop.system, "UPDATE sandbox_refund SET amount_minor = amount_minor - 1")
    shop.clock.advance(DAY_S)


BY_HAND: dict[str, Callable[[Broken], Awaitable[None]]] = {
    "provider.capture_unknown": capture_unknown,
    "provider.capture_missing": capture_missing,
    "provider.amount_differs": amount_differs,
    "provider.refund_unknown": refund_unknown,
    "provider.refund_differs": refund_differs,
}


@pytest.mark.parametrize("kind", BY_HAND)
async def test_what_no_repair_can_mend_says_what_a_human_has_to_do(shop: Broken, kind: str) -> None:
    await BY_HAND[kind](shop)
    (found,) = [each for each in await shop.run() if each.kind == kind]
    assert (found.repair, found.safe) == (None, False)
    assert found.advice
    with pytest.raises(NoSafeRepair):
        await shop.system.reconciliation.repair(int(found.id), "boss", "try")


def test_every_kind_of_the_provider_and_every_check_is_known() -> None:
    assert {kind for _, kind in MENDED.values()} | set(BY_HAND) >= PROVIDER_KINDS
    assert {check.name for check in CHECKS} <= set(KINDS)
    assert all(kind.repair or kind.human for kind in KINDS.values())
    assert {kind.repair for kind in KINDS.values()} - {None} == set(Repair)
    assert all(kind.repair for kind in KINDS.values() if kind.safe)


async def test_every_corruption_of_the_audit_is_a_difference(facts: Facts) -> None:  # noqa: F811
    system = facts.system
    missed = []
    for corruption in CORRUPTIONS:
        with suppress(Undone):
            async with system.database.transaction() as tx:
                await facts._plant(tx, corruption)
                repairs = Repairs(
                    system.orders, system.stock, system.payments, system.refunds, system.messaging.error_store
                )
                service = ReconciliationService(
                    Inside(tx),
                    system.group,
                    facts.clock,
                    system.ids,
                    ReconciliationSettings(slack_ms=0),
                    repairs,
                    {},
                )
                report = await service.run("tests", "a look", dry_run=True)
                if corruption.check not in {each.kind for each in report.differences}:
                    missed.append(corruption.label)
                raise Undone
    assert missed == []


async def test_a_shop_in_order_has_no_differences(shop: Broken) -> None:
    await pay(shop.system, shop.view)
    shop.listen()
    await shop.until(shop.is_paid, "the order is paid")
    await shop.system.refunds.ask(await shop.refund())
    await clean_in_time(shop.system, shop.clock)
    shop.clock.advance(2 * DAY_S)
    report = await shop.system.reconciliation.run("tests", "a look")
    assert (report.found, report.new, report.notes, report.differences) == (0, 0, (), ())
    assert report.kinds == len(CHECKS) + len(PROVIDER_KINDS)


async def test_a_dismissed_difference_stays_dismissed_until_it_says_something_else(shop: Broken) -> None:
    await capture_unknown(shop)
    desk = shop.system.reconciliation
    (found,) = [each for each in await shop.run() if each.kind == "provider.capture_unknown"]
    assert (await desk.dismiss(int(found.id), "boss", "known")).state is State.DISMISSED
    assert [each for each in await shop.run() if each.id == found.id] == []
    with pytest.raises(DifferenceClosed):
        await desk.repair(int(found.id), "boss", "no")
    await change(shop.system, "UPDATE sandbox_trade SET amount_minor = amount_minor + 5")
    (again,) = [each for each in await shop.run() if each.kind == "provider.capture_unknown"]
    assert again.id == found.id
    await change(
        shop.system,
        "UPDATE sandbox_trade SET payment_id = :id, amount_minor = amount_minor - 5",
        id=shop.payment_id,
    )
    assert [each for each in await shop.run() if each.kind == "provider.capture_unknown"] == []
    assert (await desk.get(int(found.id))).state is State.GONE
    with pytest.raises(DifferenceClosed):
        await desk.dismiss(int(found.id), "boss", "late")
    actions = [each["action"] for each in await desk.entries(int(found.id))]
    assert actions == ["dismiss", "reopen"]


async def test_a_difference_that_is_gone_is_not_repaired(shop: Broken) -> None:
    await paid_but_held(shop)
    (found,) = await shop.run()
    await shop.system.stock.settle([int(shop.view.id)])
    with pytest.raises(DifferenceClosed):
        await shop.system.reconciliation.repair(int(found.id), "boss", "too late")
    assert (await shop.system.reconciliation.get(int(found.id))).state is State.GONE


async def test_odd_wishes_are_refused(shop: Broken) -> None:
    desk = shop.system.reconciliation
    with pytest.raises(DifferenceNotFound):
        await desk.repair(77, "boss", "why")
    with pytest.raises(DifferenceNotFound):
        await desk.dismiss(77, "boss", "why")
    for actor, reason in (("", "why"), ("boss", ""), ("boss", "a\nb"), ("x" * 129, "why"), ("boss", "x" * 201)):
        with pytest.raises(InvalidInput):
            await desk.repair(77, actor, reason)
    with pytest.raises(InvalidInput):
        await desk.list(limit=201)


@pytest.mark.parametrize("repair", ["ask", "auto"])
async def test_the_sweeper_repairs_what_is_safe_only_when_told_to(
    start_system: StartSystem, settings: Settings, monkeypatch: pytest.MonkeyPatch, repair: Any
) -> None:
    clock = ManualClock(NOON_US)
    settings = msgspec.structs.replace(
        with_orders(settings, time_out_ms=LONG_MS), reconciliation=ReconciliationSettings(repair=repair)
    )
    system = await start_system(settings, clock=clock, work=False)
    await stock_up(system, "SKU-1", 10)
    await deafen_feed(system)
    shop = Broken(system, clock, await order(system, quantity=2), monkeypatch)
    await paid_but_held(shop)
    assert await system.reconciliation.sweep() == 1
    assert await system.reconciliation.sweep() == 0  # not before its interval is over
    states = await rows(system, "SELECT kind, state FROM reconciliation_difference")
    wanted = "repaired" if repair == "auto" else "open"
    assert states == [{"kind": "stock.stranded", "state": wanted}]
    clock.advance(61)
    await system.reconciliation.sweep()
    assert len(await rows(system, "SELECT id FROM reconciliation_log WHERE action = 'run'")) == 2
    clock.advance(8 * DAY_S)
    await system.reconciliation.sweep()
    assert len(await rows(system, "SELECT id FROM reconciliation_log WHERE action = 'run'")) == 1


async def test_two_comparisons_at_once_write_one_row(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, settings, work=False)
    await stock_up(systems[0], "SKU-1", 1)
    await change(systems[0], "UPDATE stock_level SET available = available + 1, total = total + 1")
    await asyncio.gather(*(systems[number % len(systems)].reconciliation.run("tests") for number in range(8)))
    found = await rows(systems[0], "SELECT kind, state FROM reconciliation_difference")
    assert found == [{"kind": "stock.ledger_sums", "state": "open"}]
    assert await count(systems[0], "SELECT id FROM reconciliation_log WHERE action = 'run'") == 8


async def test_the_running_sweeper_finds_by_itself(start_system: StartSystem, settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, reconciliation=ReconciliationSettings(every_ms=1_000, slack_ms=0))
    system = await start_system(settings)
    await stock_up(system, "SKU-1", 1)
    await change(system, "UPDATE stock_level SET available = available + 1, total = total + 1")

    async def found() -> bool:
        return await count(system, "SELECT id FROM reconciliation_difference WHERE state = 'open'") == 1

    await eventually(found, "the sweeper found it")
    await change(system, "UPDATE stock_level SET available = available - 1, total = total - 1")

    async def gone() -> bool:
        return await count(system, "SELECT id FROM reconciliation_difference WHERE state = 'gone'") == 1

    await eventually(gone, "the sweeper saw that it is gone")
