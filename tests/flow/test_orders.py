"""An order from end to end, and everything that can come between."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from holdfast.audit import audit
from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock
from holdfast.errors import HoldfastError, InvalidInput, Unavailable
from holdfast.messaging.tables import messages
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderDue, RefundRequested
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.orders import service as orders_service
from holdfast.services.orders.model import (
    MixedCurrencies,
    NotCancellable,
    OrderLine,
    OrderNotFound,
    OrderStatus,
    OrderView,
    Placed,
    PlaceRequest,
    SoldOut,
    UnknownSku,
)
from holdfast.services.orders.service import Expiry
from holdfast.services.payments.model import PaymentOrder, Verdict
from holdfast.services.payments.needs import ForgedNotice, RefundAnswer, RefundEnd, TradeAnswer
from holdfast.services.payments.sandbox import SIGNATURE_HEADER
from holdfast.services.payments.sandbox_book import TradeClosed
from holdfast.services.schema import metadata
from holdfast.services.stock.model import Sku
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually, with_orders
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    becomes,
    clean,
    clean_in_time,
    count,
    deliver,
    drained,
    in_time,
    level,
    level_becomes,
    lose,
    order,
    pay,
    pay_at_sandbox,
    placed_view,
    rows,
    signed_notice,
    status,
    stock_up,
    two_systems,
    wish,
)

TIME_OUT_S = 60  # of the quick settings


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON_US)


async def everything(system: System) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the shop and its messages, to see that something changed nothing; the feed aside, which follows."""
    tables = [each for each in metadata.sorted_tables if not each.name.startswith("feed_")]
    async with system.database.read() as tx:
        found = {each.name: sorted(tuple(row) for row in await tx.execute(select(each))) for each in tables}
        others = select(messages).where(messages.c.queue != topology.FEED_QUEUE)
        return found | {messages.name: sorted(tuple(row) for row in await tx.execute(others))}


def several(*lines: tuple[str, int], buyer: str = "ann", key: str = "key-1") -> PlaceRequest:
    """A buyer's wish for some units of each of several SKUs."""
    wanted = tuple(OrderLine(sku=sku, quantity=quantity) for sku, quantity in lines)
    return PlaceRequest(buyer=buyer, idempotency_key=key, lines=wanted)


async def closes_in_time(system: System, clock: ManualClock, view: OrderView) -> None:
    """Let the clock run until the order is closed."""

    async def closed() -> bool:
        return await status(system, view) is OrderStatus.CLOSED

    await in_time(clock, closed, f"order {view.id} is closed")


async def refunds_in_time(system: System, clock: ManualClock, view: OrderView) -> None:
    """Let the clock run until the order's money is given back, then see that it was given back once."""

    async def refunded() -> bool:
        (payment,) = await rows(
            system,
            "SELECT captured_minor, refunded_minor FROM payment_order WHERE order_id = :order_id",
            order_id=int(view.id),
        )
        return payment == {"captured_minor": view.amount_minor, "refunded_minor": view.amount_minor}

    await in_time(clock, refunded, f"the money of order {view.id} is refunded", step_s=0.25)
    booked = await rows(
        system,
        """SELECT refund.amount_minor, refund.status FROM payment_refund refund
           JOIN payment_order payment ON payment.id = refund.payment_id WHERE payment.order_id = :order_id""",
        order_id=int(view.id),
    )
    assert booked == [{"amount_minor": view.amount_minor, "status": "done"}]
    given = await rows(
        system,
        "SELECT amount_minor FROM sandbox_refund WHERE payment_id = :payment_id",
        payment_id=int(view.payment.id),
    )
    assert given == [{"amount_minor": view.amount_minor}]


class TestPlacing:
    async def test_the_last_unit_can_be_sold(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)

        view = await order(system, quantity=3)

        assert view.status is OrderStatus.PENDING_PAYMENT
        assert view.amount_minor == 3 * PRICE_MINOR
        now = await level(system)
        assert (now.available, now.held) == (0, 3)
        assert await system.orders.get(int(view.id), "ann") == view
        await clean(system)

    async def test_sold_out_changes_nothing_and_leaves_the_key_unused(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)
        await stock_up(system, "SKU-2", 1)
        before = await everything(system)
        wanted = several(("SKU-1", 3), ("SKU-2", 2))

        with pytest.raises(SoldOut, match=r"SKU-2.* 1 are left, 2 were wanted"):
            await system.orders.place(wanted)

        assert await everything(system) == before
        # The key was not used up: the same wish succeeds once there is enough, and so would another one.
        await stock_up(system, "SKU-2", 1)
        assert not (await system.orders.place(wanted)).replayed

    async def test_a_refused_order_leaves_its_key_for_other_lines(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)
        with pytest.raises(SoldOut):
            await system.orders.place(wish("ann", quantity=4, key="k"))

        placed = await system.orders.place(wish("ann", quantity=3, key="k"))

        assert placed_view(placed).lines[0].quantity == 3

    async def test_a_refused_order_leaves_its_key_for_other_lines_decided_together_with_it(
        self, system: System
    ) -> None:
        # Both requests are handed in within one turn of the loop, so one group commit decides both, in this order.
        await stock_up(system, "SKU-1", 3)

        first, second = await asyncio.gather(
            system.orders.place(wish("ann", quantity=4, key="k")),
            system.orders.place(wish("ann", quantity=3, key="k")),
            return_exceptions=True,
        )

        assert isinstance(first, SoldOut)
        assert isinstance(second, Placed)
        await clean(system)

    async def test_a_reused_key_is_found_out_within_one_group_commit(self, system: System) -> None:
        await stock_up(system, "SKU-1", 9)

        first, second, third = await asyncio.gather(
            system.orders.place(wish("ann", quantity=2, key="k")),
            system.orders.place(wish("ann", quantity=3, key="k")),
            system.orders.place(wish("ann", quantity=2, key="k")),
            return_exceptions=True,
        )

        assert isinstance(first, Placed)
        assert isinstance(second, KeyReused)
        assert isinstance(third, Placed)
        assert (third.order_id, third.body, third.replayed) == (first.order_id, first.body, True)
        assert (await level(system)).held == 2

    async def test_a_repeated_wish_for_the_last_unit_gets_its_answer_from_any_system(
        self, start_system: StartSystem, settings: Settings
    ) -> None:
        # Both systems look up the key before either has committed, then both queue for the same last unit.
        systems = await two_systems(start_system, settings)
        await stock_up(systems[0], "SKU-1", 1)
        async with systems[0].database.transaction() as tx:
            await tx.execute(select(metadata.tables["stock_level"]).with_for_update())
            wishes = [asyncio.create_task(each.orders.place(wish("ann"))) for each in systems]
            if len(systems) > 1:

                async def both_wait() -> bool:
                    locked = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                    return await count(systems[0], f"{locked} AND wait_event_type = 'Lock'") == 2

                await eventually(both_wait, "both systems wait for the level's row")

        answers = await asyncio.gather(*wishes)

        assert len({answer.order_id for answer in answers}) == 1
        assert len({answer.body for answer in answers}) == 1

    async def test_an_unknown_sku_is_refused(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)
        before = await everything(system)

        with pytest.raises(UnknownSku, match="SKU-2"):
            await system.orders.place(several(("SKU-1", 1), ("SKU-2", 1)))

        assert await everything(system) == before

    async def test_a_sku_that_never_came_in_is_sold_out(self, system: System) -> None:
        await system.stock.keep_sku(Sku(sku="SKU-1", title="soon", price_minor=1, currency="CNY"))

        with pytest.raises(SoldOut):
            await system.orders.place(wish("ann"))

    async def test_mixed_currencies_are_refused(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)
        await stock_up(system, "SKU-2", 3)
        await system.stock.keep_sku(Sku(sku="SKU-2", title="SKU-2", price_minor=1_000, currency="EUR"))
        before = await everything(system)

        with pytest.raises(MixedCurrencies, match="CNY, EUR"):
            await system.orders.place(several(("SKU-1", 1), ("SKU-2", 1)))

        assert await everything(system) == before

    async def test_a_sku_on_two_lines_is_refused(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)
        before = await everything(system)

        with pytest.raises(InvalidInput, match="stands on two lines"):
            await system.orders.place(several(("SKU-1", 1), ("SKU-1", 2)))

        assert await everything(system) == before

    async def test_lines_and_quantities_have_limits(self, start_system: StartSystem, settings: Settings) -> None:
        system = await start_system(with_orders(settings, lines_max=3, quantity_max=5))
        for number in range(4):
            await stock_up(system, f"SKU-{number}", 100)

        with pytest.raises(InvalidInput, match="at least one line"):
            await system.orders.place(several(key="none"))
        with pytest.raises(InvalidInput, match="at most 3 lines, this one has 4"):
            await system.orders.place(several(*((f"SKU-{number}", 1) for number in range(4)), key="four"))
        with pytest.raises(InvalidInput, match="at most 5, 'SKU-0' asks for 6"):
            await system.orders.place(several(("SKU-0", 6), key="six"))
        assert await count(system, "SELECT id FROM order_order") == 0

        await system.orders.place(several(*((f"SKU-{number}", 5) for number in range(3)), key="all"))
        assert await count(system, "SELECT order_id FROM order_line") == 3

    @pytest.mark.parametrize("quantity", [0, -1])
    async def test_a_quantity_below_one_is_invalid(self, system: System, quantity: int) -> None:
        await stock_up(system, "SKU-1", 3)
        before = await everything(system)

        with pytest.raises(InvalidInput):
            await system.orders.place(wish("ann", quantity=quantity))

        assert await everything(system) == before

    async def test_the_dearest_order_can_be_paid_or_is_refused(self, system: System) -> None:
        await stock_up(system, "SKU-1", 100)
        dearest = 1_000_000_000_000  # the highest price a SKU may have
        await system.stock.keep_sku(Sku(sku="SKU-1", title="palace", price_minor=dearest, currency="CNY"))

        try:
            view = await order(system, quantity=2)
        except HoldfastError:
            return
        assert await deliver(system, await pay_at_sandbox(system, view)) is Verdict.APPLIED

    async def test_sixty_buyers_for_ten_units_are_ten_orders(self, system: System) -> None:
        await stock_up(system, "SKU-1", 10)

        outcomes = await asyncio.gather(
            *(system.orders.place(wish(f"buyer-{number}")) for number in range(60)), return_exceptions=True
        )

        assert Counter(type(outcome) for outcome in outcomes) == {Placed: 10, SoldOut: 50}
        now = await level(system)
        assert (now.available, now.held, now.total) == (0, 10, 10)
        assert await count(system, "SELECT id FROM order_order") == 10
        await clean(system)

    async def test_two_systems_on_one_database_sell_ten_of_ten(
        self, start_system: StartSystem, settings: Settings
    ) -> None:
        systems = await two_systems(start_system, settings)
        await stock_up(systems[0], "SKU-1", 10)

        async def buy(number: int) -> bool:
            system = systems[number % len(systems)]
            try:
                placed = await system.orders.place(wish(f"buyer-{number}"))
            except SoldOut:
                return False
            await pay(systems[(number + 1) % len(systems)], placed_view(placed))
            return True

        bought = await asyncio.gather(*(buy(number) for number in range(40)))

        assert sum(bought) == 10
        await level_becomes(systems[0], available=0, held=0, sold=10)
        assert await count(systems[0], "SELECT id FROM order_order WHERE status = 'paid'") == 10
        await clean(systems[0])

    async def test_a_price_change_leaves_placed_orders_alone(self, system: System) -> None:
        await stock_up(system, "SKU-1", 3)
        view = await order(system, quantity=2)

        await system.stock.keep_sku(Sku(sku="SKU-1", title="dearer", price_minor=9_999, currency="EUR"))

        assert await system.orders.get(int(view.id), "ann") == view
        dearer = await order(system, "bob")
        assert (dearer.amount_minor, dearer.currency) == (9_999, "EUR")
        await pay(system, view)
        await becomes(system, view, OrderStatus.PAID)
        paid = await system.orders.get(int(view.id), "ann")
        assert (paid.amount_minor, paid.currency, paid.lines) == (2 * PRICE_MINOR, "CNY", view.lines)
        await clean(system)


class TestDeadline:
    async def test_an_unpaid_order_is_closed_at_its_deadline_and_never_before(
        self, start_system: StartSystem, settings: Settings, clock: ManualClock
    ) -> None:
        system = await start_system(settings, clock=clock)
        for sweeper in system.sweepers:
            await sweeper.stop()  # the message alone has to do it
        await stock_up(system, "SKU-1", 1)
        view = await order(system)

        clock.advance(TIME_OUT_S - 0.000_001)
        # A wake-up that comes early is sent back; when it was, the listener is known to have had its chance.
        early = OrderDue(order_id=int(view.id))
        await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_DUE, early)

        async def sent_back() -> bool:
            stats = await system.transport.stats(topology.ORDER_DUE_QUEUE)
            return (stats.ready, stats.unacked, stats.delayed) == (0, 0, 2)

        await eventually(sent_back, "the early message is sent back")
        assert await system.orders.expire(int(view.id)) is Expiry.EARLY
        assert await status(system, view) is OrderStatus.PENDING_PAYMENT
        assert (await level(system)).held == 1

        clock.advance(0.000_001)

        await becomes(system, view, OrderStatus.CLOSED)
        await level_becomes(system, available=1, held=0)
        (entry,) = await rows(system, "SELECT at_us, actor FROM order_log WHERE to_status = 'closed'")
        assert entry == {"at_us": NOON_US + TIME_OUT_S * US_PER_S, "actor": "deadline"}
        with pytest.raises(TradeClosed):
            await pay_at_sandbox(system, view)
        await clean_in_time(system, clock)

    async def test_the_sweeper_alone_closes_an_order_whose_message_was_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        assert await lose(system, "order.due") == 1

        clock.advance(TIME_OUT_S - 1)
        await closes_in_time(system, clock, view)

        (entry,) = await rows(system, "SELECT at_us, actor FROM order_log WHERE to_status = 'closed'")
        assert entry["actor"] == "deadline"
        assert entry["at_us"] >= NOON_US + TIME_OUT_S * US_PER_S
        await level_becomes(system, available=1, held=0)
        await clean_in_time(system, clock)

    async def test_orders_that_fail_to_close_keep_the_sweeper_from_no_other(
        self, start_system: StartSystem, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(orders_service, "EXPIRE_AT_ONCE", 2)  # as if 32 orders failed
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 3)
        stuck = {int((await order(system, f"buyer-{number}")).id) for number in range(2)}
        clock.advance(0.001)
        view = await order(system)
        close = system.sandbox.close

        async def fail_for_some(payment: PaymentOrder) -> TradeAnswer:
            if payment.order_id in stuck:
                raise InvalidInput("the provider does not understand us")
            return await close(payment)

        monkeypatch.setattr(system.sandbox, "close", fail_for_some)
        await lose(system, "order.due")
        clock.advance(TIME_OUT_S)

        async def closed() -> bool:
            return await status(system, view) is OrderStatus.CLOSED

        await in_time(clock, closed, "the order behind them is closed", within_s=20, step_s=0.5)

    async def test_many_orders_the_provider_knows_nothing_of_keep_the_sweeper_from_no_other(
        self, start_system: StartSystem, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(orders_service, "SWEEP_PAGE", 3)  # as if there were 500 of them
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 4)
        stuck = {int((await order(system, f"buyer-{number}")).id) for number in range(3)}
        clock.advance(0.001)
        view = await order(system)
        close = system.sandbox.close

        async def unknown_for_some(payment: PaymentOrder) -> TradeAnswer:
            return TradeAnswer(end=TradeEnd.UNKNOWN) if payment.order_id in stuck else await close(payment)

        monkeypatch.setattr(system.sandbox, "close", unknown_for_some)
        await lose(system, "order.due")
        clock.advance(TIME_OUT_S)

        async def closed() -> bool:
            return await status(system, view) is OrderStatus.CLOSED

        await in_time(clock, closed, "the order behind them is closed", within_s=20, step_s=0.5)

    async def test_an_order_stays_open_while_the_provider_does_not_answer_and_is_closed_later(
        self, start_system: StartSystem, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        close = system.sandbox.close
        asked = 0

        async def unknown_at_first(payment: PaymentOrder) -> TradeAnswer:
            nonlocal asked
            asked += 1
            return TradeAnswer(end=TradeEnd.UNKNOWN) if asked <= 3 else await close(payment)

        monkeypatch.setattr(system.sandbox, "close", unknown_at_first)
        with pytest.raises(Unavailable):
            await system.orders.cancel(int(view.id), "ann")
        clock.advance(TIME_OUT_S)
        assert await system.orders.expire(int(view.id)) is Expiry.UNKNOWN
        assert await status(system, view) is OrderStatus.PENDING_PAYMENT
        assert (await level(system)).held == 1

        await closes_in_time(system, clock, view)

        assert asked > 3
        await level_becomes(system, available=1, held=0)
        assert await count(system, "SELECT id FROM hf_parked") == 0
        await clean_in_time(system, clock)

    async def test_money_whose_notice_was_lost_is_found_at_the_deadline(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = await pay_at_sandbox(system, view)  # and the notice is never delivered

        clock.advance(TIME_OUT_S)

        await becomes(system, view, OrderStatus.PAID)
        await level_becomes(system, available=0, held=0, sold=1)
        # It comes after all: the same trade under another event, told again.
        assert await deliver(system, notice) is Verdict.REPEATED
        await clean_in_time(system, clock)

    async def test_the_sweeper_heals_a_payment_whose_message_was_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await pay(system, view)
        assert await lose(system, "payment.succeeded") == 1
        assert await lose(system, "order.due") == 1
        clock.advance(TIME_OUT_S + 1)

        system.work()

        async def paid() -> bool:
            return await status(system, view) is OrderStatus.PAID

        await in_time(clock, paid, "the order is paid")
        await level_becomes(system, available=0, held=0, sold=1)
        await clean_in_time(system, clock)


class TestPaying:
    async def test_the_deadline_message_of_a_paid_order_is_gone(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        assert (await system.transport.stats(topology.ORDER_DUE_QUEUE)).delayed == 1

        await pay(system, view)
        await becomes(system, view, OrderStatus.PAID)

        assert (await system.transport.stats(topology.ORDER_DUE_QUEUE)).total == 0
        await level_becomes(system, held=0, sold=1)
        await clean(system)

    async def test_a_paid_order_is_never_closed(self, start_system: StartSystem, clock: ManualClock) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await pay(system, view)
        await becomes(system, view, OrderStatus.PAID)
        body = OrderDue(order_id=int(view.id))
        await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_DUE, body, delay_ms=TIME_OUT_S * 1_000)

        clock.advance(TIME_OUT_S * 2)

        async def handled() -> bool:
            return (await system.transport.stats(topology.ORDER_DUE_QUEUE)).total == 0

        await eventually(handled, "the wake-up is handled")
        assert await system.orders.expire(int(view.id)) is Expiry.DONE
        assert await system.orders.sweep(0) == 0
        assert await status(system, view) is OrderStatus.PAID
        await level_becomes(system, sold=1)
        await clean_in_time(system, clock)

    async def test_a_paid_order_cannot_be_cancelled(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await pay(system, view)
        await becomes(system, view, OrderStatus.PAID)

        with pytest.raises(NotCancellable, match="the order is paid"):
            await system.orders.cancel(int(view.id), "ann")

        assert await status(system, view) is OrderStatus.PAID
        await level_becomes(system, sold=1)
        await clean(system)

    async def test_an_order_whose_money_is_at_the_provider_cannot_be_cancelled(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await pay_at_sandbox(system, view)  # its notice is still on the way

        with pytest.raises(NotCancellable, match="being paid"):
            await system.orders.cancel(int(view.id), "ann")

        await becomes(system, view, OrderStatus.PAID)
        await level_becomes(system, sold=1)
        await clean(system)

    async def test_a_notice_delivered_five_times_counts_once(
        self, start_system: StartSystem, settings: Settings
    ) -> None:
        systems = await two_systems(start_system, settings)
        system = systems[0]
        await stock_up(system, "SKU-1", 3)
        view = await order(system)
        notice = await pay_at_sandbox(system, view)

        verdicts = await asyncio.gather(*(deliver(systems[number % len(systems)], notice) for number in range(4)))
        verdicts.append(await deliver(system, notice))

        assert set(verdicts) == {Verdict.APPLIED}  # the stored verdict is what is answered again
        await becomes(system, view, OrderStatus.PAID)
        await level_becomes(system, held=0, sold=1)
        assert await count(system, "SELECT event_id FROM payment_notice") == 1
        assert await count(system, "SELECT id FROM order_log WHERE to_status = 'paid'") == 1
        assert await count(system, "SELECT message_id FROM hf_inbox WHERE consumer = 'orders.pay'") == 1
        await clean(system)

    async def test_paying_twice_by_link_is_one_trade(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)

        first, second = await asyncio.gather(pay_at_sandbox(system, view), pay_at_sandbox(system, view))

        assert first.body == second.body
        assert await deliver(system, first) is Verdict.APPLIED
        assert await deliver(system, second) is Verdict.APPLIED
        await level_becomes(system, sold=1)
        assert await rows(system, "SELECT captured_minor FROM payment_order") == [{"captured_minor": PRICE_MINOR}]
        await clean(system)

    @pytest.mark.parametrize(
        "wrong",
        [{"amount_minor": 1}, {"amount_minor": 10 * PRICE_MINOR}, {"currency": "EUR"}, {"merchant_id": "another-shop"}],
        ids=["less", "more", "currency", "merchant"],
    )
    async def test_a_notice_with_wrong_facts_is_parked(self, system: System, wrong: dict[str, Any]) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = signed_notice(system, view, system.clock.now_us(), event_id="wrong", **wrong)

        assert await deliver(system, notice) is Verdict.WRONG_FACTS
        assert await deliver(system, notice) is Verdict.WRONG_FACTS

        assert await status(system, view) is OrderStatus.PENDING_PAYMENT
        assert await rows(system, "SELECT status, captured_minor FROM payment_order") == [
            {"status": 1, "captured_minor": 0}
        ]
        report = await audit(system.database, system.clock, 0)
        (finding,) = report.findings
        assert finding.name == "money.notices"
        assert [row["event_id"] for row in finding.rows] == ["wrong"]
        # The right one is not held up by it.
        await pay(system, view)
        await becomes(system, view, OrderStatus.PAID)
        await level_becomes(system, sold=1)

    async def test_a_notice_of_no_payment_of_ours_is_parked(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = signed_notice(system, view, system.clock.now_us(), payment_id="7")

        assert await deliver(system, notice) is Verdict.UNKNOWN_PAYMENT

        assert await status(system, view) is OrderStatus.PENDING_PAYMENT
        report = await audit(system.database, system.clock, 0)
        assert [finding.name for finding in report.findings] == ["money.notices"]

    async def test_a_second_trade_for_a_paid_order_is_parked(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await pay(system, view)
        await becomes(system, view, OrderStatus.PAID)
        await level_becomes(system, sold=1)

        assert await deliver(system, signed_notice(system, view, system.clock.now_us())) is Verdict.SECOND_TRADE

        assert await status(system, view) is OrderStatus.PAID
        report = await audit(system.database, system.clock, 0)
        assert [finding.name for finding in report.findings] == ["money.notices"]

    async def test_a_forged_notice_changes_nothing(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        genuine = signed_notice(system, view, system.clock.now_us())
        sent, _, mac = genuine.signature.partition(",v1=")
        headers: dict[str, dict[str, str]] = {
            "no signature": {},
            "empty": {SIGNATURE_HEADER: ""},
            "garbage": {SIGNATURE_HEADER: "t=1,v1=zz"},
            "not ASCII": {SIGNATURE_HEADER: f"{sent},v1=é{mac[1:]}"},
            "flipped": {SIGNATURE_HEADER: f"{sent},v1={'0' if mac[0] != '0' else '1'}{mac[1:]}"},
            "another instant": {SIGNATURE_HEADER: f"t={int(sent[2:]) + 1},v1={mac}"},
        }
        before = await everything(system)

        for header in headers.values():
            with pytest.raises(ForgedNotice):
                await system.payments.notice("sandbox", header, genuine.body.encode())
        for body in (genuine.body.replace("CNY", "EUR"), genuine.body + " ", ""):
            with pytest.raises(ForgedNotice):
                await system.payments.notice("sandbox", {SIGNATURE_HEADER: genuine.signature}, body.encode())

        assert await everything(system) == before
        assert before["payment_notice"] == []

    @pytest.mark.parametrize("seconds", [301, -301], ids=["too old", "from the future"])
    async def test_a_notice_of_another_time_changes_nothing(
        self, start_system: StartSystem, clock: ManualClock, seconds: int
    ) -> None:
        system = await start_system(work=False, clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = signed_notice(system, view, clock.now_us())
        before = await everything(system)
        clock.jump_wall(seconds)

        with pytest.raises(ForgedNotice, match="too old or from the future"):
            await deliver(system, notice)

        assert await everything(system) == before

    async def test_money_captured_after_the_deadline_is_refunded_and_closes_the_order(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        clock.advance(TIME_OUT_S + 1)
        late = signed_notice(system, view, NOON_US + TIME_OUT_S * US_PER_S + 1)
        assert await status(system, view) is OrderStatus.PENDING_PAYMENT
        assert await deliver(system, late) is Verdict.APPLIED

        system.work()

        await refunds_in_time(system, clock, view)
        assert await status(system, view) is OrderStatus.CLOSED
        await level_becomes(system, available=1, held=0, sold=0)
        assert await deliver(system, late) is Verdict.APPLIED
        await clean_in_time(system, clock)
        await refunds_in_time(system, clock, view)  # still once

    async def test_money_captured_at_the_deadline_to_the_microsecond_pays_the_order(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        clock.advance(TIME_OUT_S + 1)
        assert await deliver(system, signed_notice(system, view, NOON_US + TIME_OUT_S * US_PER_S)) is Verdict.APPLIED

        system.work()

        await becomes(system, view, OrderStatus.PAID)
        await level_becomes(system, sold=1)
        await clean_in_time(system, clock)

    @pytest.mark.parametrize("end", [OrderStatus.CLOSED, OrderStatus.CANCELLED])
    async def test_money_whose_notice_comes_after_the_end_is_refunded_once(
        self, start_system: StartSystem, clock: ManualClock, end: OrderStatus
    ) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = signed_notice(system, view, clock.now_us())  # captured in time
        if end is OrderStatus.CLOSED:
            clock.advance(TIME_OUT_S)
        else:
            await system.orders.cancel(int(view.id), "ann")
        await becomes(system, view, end)
        await level_becomes(system, available=1, held=0)

        again = signed_notice(system, view, NOON_US, event_id="told-under-another-id")
        verdicts = [await deliver(system, notice), await deliver(system, notice), await deliver(system, again)]

        assert verdicts == [Verdict.APPLIED, Verdict.APPLIED, Verdict.REPEATED]
        await refunds_in_time(system, clock, view)
        assert await status(system, view) is end
        await clean_in_time(system, clock)
        assert (await level(system)).available == 1

    async def test_a_refund_is_asked_for_again_until_the_provider_answers(
        self, start_system: StartSystem, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = signed_notice(system, view, clock.now_us())
        await system.orders.cancel(int(view.id), "ann")
        refund = system.sandbox.refund
        asked: list[int] = []

        async def done_but_unknown(payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
            asked.append(refund_id)
            done = await refund(payment, refund_id, amount_minor)  # it happens, but its answer is lost
            return done if len(asked) > 3 else RefundAnswer(end=RefundEnd.UNKNOWN)

        monkeypatch.setattr(system.sandbox, "refund", done_but_unknown)
        await deliver(system, notice)

        await refunds_in_time(system, clock, view)
        assert len(asked) > 3
        assert len(set(asked)) == 1
        await clean_in_time(system, clock)


class TestCancelling:
    async def test_another_buyers_order_does_not_exist(self, system: System) -> None:
        await stock_up(system, "SKU-1", 1)
        view = await order(system, "ann")
        before = await everything(system)

        for call in (system.orders.get, system.orders.cancel):
            with pytest.raises(OrderNotFound):
                await call(int(view.id), "bob")
            with pytest.raises(OrderNotFound):
                await call(int(view.id) + 1, "ann")

        assert await everything(system) == before
        assert await status(system, view) is OrderStatus.PENDING_PAYMENT

    async def test_cancelling_gives_the_units_back_and_hides_the_pay_link(self, system: System) -> None:
        await stock_up(system, "SKU-1", 2)
        view = await order(system, quantity=2)
        assert view.payment.pay_url is not None

        cancelled = await system.orders.cancel(int(view.id), "ann")

        assert cancelled.status is OrderStatus.CANCELLED
        assert cancelled.payment.pay_url is None
        assert cancelled == msgspec.structs.replace(
            view, status=OrderStatus.CANCELLED, payment=msgspec.structs.replace(view.payment, pay_url=None)
        )
        await level_becomes(system, available=2, held=0)
        assert (await system.transport.stats(topology.ORDER_DUE_QUEUE)).total == 0
        await order(system, "bob", quantity=2)
        await clean(system)

    async def test_a_closed_order_cannot_be_cancelled(self, start_system: StartSystem, clock: ManualClock) -> None:
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        clock.advance(TIME_OUT_S)
        await becomes(system, view, OrderStatus.CLOSED)

        with pytest.raises(NotCancellable, match="the order is closed"):
            await system.orders.cancel(int(view.id), "ann")

    async def test_a_duplicated_closed_message_gives_the_units_back_once(self, system: System) -> None:
        await stock_up(system, "SKU-1", 5)
        await order(system, "bob", quantity=2)
        view = await order(system, quantity=2)
        await system.orders.cancel(int(view.id), "ann")
        body = OrderClosed(order_id=int(view.id), status="cancelled")
        for message_id in ("twin", "twin", "stranger"):
            await system.publisher.publish(
                topology.ORDER_EVENTS, topology.KEY_ORDER_CLOSED, body, message_id=message_id
            )

        async def handled() -> bool:
            return await drained(system, topology.STOCK_RELEASE_QUEUE)

        await eventually(handled, "all copies are handled")
        now = await level(system)
        assert (now.available, now.held) == (3, 2)
        assert await count(system, "SELECT message_id FROM hf_inbox WHERE consumer = 'stock.release'") == 3
        await clean(system)


class Deadline:
    """Passes after so many looks of those who race, wherever the others are by then."""

    def __init__(self, clock: ManualClock, after: int) -> None:
        self._clock = clock
        self._after = after
        self.passed = asyncio.Event()

    def come_nearer(self) -> None:
        self._after -= 1
        if self._after == 0:  # later looks bring it no nearer
            self._clock.advance(0.001)
            self.passed.set()


class TestRaces:
    @pytest.mark.parametrize("seed", [1, 2, 3])
    async def test_of_pay_cancel_and_expire_exactly_one_wins(
        self, start_system: StartSystem, settings: Settings, clock: ManualClock, seed: int
    ) -> None:
        chance = random.Random(seed)
        system = await start_system(clock=clock)
        await stock_up(system, "SKU-1", 50)
        views: list[OrderView] = []
        paid: list[str] = []
        cancelled: list[str] = []

        async def look_first(view: OrderView, buyer: str, deadline: Deadline) -> None:
            """Be late by some reads, so that now one and now another comes first, however fast the machine is."""
            for _ in range(chance.randrange(6)):
                await system.orders.get(int(view.id), buyer)
                deadline.come_nearer()

        async def pays(view: OrderView, buyer: str, deadline: Deadline) -> str:
            await look_first(view, buyer, deadline)
            try:
                await pay(system, view)
            except TradeClosed:
                return "refused"
            return "paid"

        async def cancels(view: OrderView, buyer: str, deadline: Deadline) -> str:
            await look_first(view, buyer, deadline)
            try:
                await system.orders.cancel(int(view.id), buyer)
            except NotCancellable:
                return "refused"
            return "cancelled"

        async def expires(view: OrderView, buyer: str, deadline: Deadline) -> None:
            await look_first(view, buyer, deadline)
            if await system.orders.expire(int(view.id)) is Expiry.EARLY:
                await deadline.passed.wait()
                assert await system.orders.expire(int(view.id)) is not Expiry.EARLY

        async def looks(visits: list[tuple[OrderView, str]], deadline: Deadline) -> None:
            """Somebody who only looks, so that the deadline comes whatever the others do."""
            while not deadline.passed.is_set():
                await look_first(*visits[0], deadline)

        for wave in range(10):
            buyers = [f"buyer-{wave}-{number}" for number in range(5)]
            wave_views = [await order(system, buyer) for buyer in buyers]
            clock.advance(TIME_OUT_S - 0.001)
            deadline = Deadline(clock, after=chance.randrange(1, 40))
            visits = list(zip(wave_views, buyers, strict=True))
            wave_paid, wave_cancelled, _, _ = await asyncio.gather(
                asyncio.gather(*(pays(*visit, deadline) for visit in visits)),
                asyncio.gather(*(cancels(*visit, deadline) for visit in visits)),
                asyncio.gather(*(expires(*visit, deadline) for visit in visits)),
                looks(visits, deadline),
            )
            views += wave_views
            paid += wave_paid
            cancelled += wave_cancelled

        await clean_in_time(system, clock)
        logged = await rows(system, "SELECT order_id FROM order_log WHERE to_status <> 'pending_payment'")
        assert sorted(row["order_id"] for row in logged) == sorted(int(view.id) for view in views)
        ends = Counter[OrderStatus]()
        for number, view in enumerate(views):
            end = await status(system, view, f"buyer-{number // 5}-{number % 5}")
            ends[end] += 1
            expected = {
                OrderStatus.PAID: ("paid", "refused"),
                OrderStatus.CANCELLED: ("refused", "cancelled"),
                OrderStatus.CLOSED: ("refused", "refused"),
            }
            assert (paid[number], cancelled[number]) == expected[end], f"order {number} ended {end}"
        now = await level(system)
        assert (now.available, now.held, now.sold) == (50 - ends[OrderStatus.PAID], 0, ends[OrderStatus.PAID])
        assert await count(system, "SELECT id FROM payment_refund") == 0

    async def test_two_systems_that_close_and_pay_the_same_orders_agree(
        self, start_system: StartSystem, settings: Settings
    ) -> None:
        systems = await two_systems(start_system, settings)
        await stock_up(systems[0], "SKU-1", 20)
        views = [await order(systems[0], f"buyer-{number}") for number in range(20)]
        # Money captured in time for every order, told at the very moment when its buyer cancels somewhere else.
        notices = [signed_notice(systems[0], view, systems[0].clock.now_us()) for view in views]

        async def cancel(number: int) -> bool:
            try:
                await systems[0].orders.cancel(int(views[number].id), f"buyer-{number}")
            except NotCancellable:
                return False
            return True

        _, cancelled = await asyncio.gather(
            asyncio.gather(*(deliver(systems[-1], notice) for notice in notices)),
            asyncio.gather(*(cancel(number) for number in range(20))),
        )

        await clean(systems[0])
        ends = [await status(systems[0], view, f"buyer-{number}") for number, view in enumerate(views)]
        assert ends == [OrderStatus.CANCELLED if each else OrderStatus.PAID for each in cancelled]
        refunds = await count(systems[0], "SELECT id FROM payment_refund WHERE status = 'done'")
        assert refunds == sum(cancelled)
        assert await count(systems[0], "SELECT refund_id FROM sandbox_refund") == refunds


class TestAnyOneMessageLost:
    """The promise: every effect happens although any one message is lost. Each test loses one, before it is handled."""

    async def test_stock_is_given_back_although_order_closed_is_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await system.orders.cancel(int(view.id), "ann")
        assert await lose(system, "order.closed") == 1

        system.work()

        await self._level_in_time(system, clock, available=1, held=0)

    async def test_stock_is_deducted_although_order_paid_is_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        await pay(system, view)
        await self._work_until(system, "orders.pay")
        assert await lose(system, "order.paid") == 1

        system.work()

        await self._level_in_time(system, clock, available=0, held=0, sold=1)

    async def test_late_money_is_refunded_although_payment_succeeded_is_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        view = await self._paid_after_cancel(system)
        assert await lose(system, "payment.succeeded") == 1

        system.work()

        await refunds_in_time(system, clock, view)

    async def test_late_money_is_refunded_although_refund_requested_is_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        view = await self._paid_after_cancel(system)
        await self._work_until(system, "orders.pay")
        assert await lose(system, "refund.requested") == 1

        system.work()

        await refunds_in_time(system, clock, view)

    async def test_late_money_is_refunded_although_refund_due_is_lost(
        self, start_system: StartSystem, clock: ManualClock
    ) -> None:
        system = await start_system(work=False, clock=clock)
        view = await self._paid_after_cancel(system)
        await self._work_until(system, "orders.pay")
        # Book the refund as the listener does, without the listener that would go on to ask the provider.
        (wish_for_refund,) = await rows(system, "SELECT body FROM hf_message WHERE type = 'refund.requested'")
        request = msgspec.json.decode(wish_for_refund["body"], type=RefundRequested)
        async with system.database.transaction() as tx:
            await system.refunds._refunds.request_late(tx, [request])
        assert await lose(system, "refund.requested") == 1
        assert await lose(system, "refund.due") == 1

        system.work()

        await refunds_in_time(system, clock, view)

    @staticmethod
    async def _level_in_time(system: System, clock: ManualClock, **wanted: int) -> None:
        async def reached() -> bool:
            now = await level(system)
            return all(getattr(now, name) == value for name, value in wanted.items())

        await in_time(clock, reached, f"the level becomes {wanted}", step_s=0.5)

    @staticmethod
    async def _paid_after_cancel(system: System) -> OrderView:
        await stock_up(system, "SKU-1", 1)
        view = await order(system)
        notice = signed_notice(system, view, system.clock.now_us())
        await system.orders.cancel(int(view.id), "ann")
        await deliver(system, notice)
        return view

    @staticmethod
    async def _work_until(system: System, name: str) -> None:
        """Let one listener alone handle what waits, then stop it."""
        (listen,) = (listen for listen in system.listens if listen.name == name)
        listener = system.listen(listen)

        async def empty() -> bool:
            return (await system.transport.stats(listen.queue)).total == 0

        await eventually(empty, f"{listen.queue} is empty")
        await listener.stop()
        system.listeners.remove(listener)
