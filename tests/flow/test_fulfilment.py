"""What happens to an order beside and after its payment: limits, carts, deadlines, shipping, arrival."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock, microseconds
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.messaging.retry import Retry
from holdfast.services.carts.model import ITEMS_MAX, CartFull, Item, PutItem
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import (
    OrderCompleted,
    OrderShipped,
    PaymentSucceeded,
    RefundOpened,
    RefundSucceeded,
)
from holdfast.services.orders.fulfilment import ITSELF
from holdfast.services.orders.model import (
    CartEmpty,
    CompleteRequest,
    ExtendRequest,
    LimitReached,
    NotCancellable,
    NotCompletable,
    NotExtendable,
    NotShippable,
    OrderLine,
    OrderNotFound,
    OrderStatus,
    OrderView,
    PlaceRequest,
    PriceChanged,
    ShipRequest,
    SoldOut,
)
from holdfast.services.payments.model import RefundWish
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
    placed_view,
    probe,
    signed_notice,
    status,
    stock_up,
    two_systems,
    waiting,
    wish,
)

TIME_OUT_S = 60  # of the quick settings
DAY_S = 86_400


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON_US)


async def rule(system: System, sku: str = "SKU-1", units: int = 20, **rules: Any) -> None:
    """Put a SKU on the shelf that is sold by its own rules."""
    await stock_up(system, sku, units)
    values: dict[str, Any] = {"title": sku, "price_minor": PRICE_MINOR, "currency": "CNY"} | rules
    await system.stock.keep_sku(Sku(sku=sku, **values))


async def paid(system: System, buyer: str = "ann") -> OrderView:
    view = await order(system, buyer)
    await pay(system, view)
    await becomes(system, view, OrderStatus.PAID, buyer)
    return view


def shipping(view: OrderView, tracking: str = "SF 123") -> ShipRequest:
    return ShipRequest(order_id=int(view.id), tracking=tracking, actor="boss")


def arrival(view: OrderView, buyer: str | None = "ann") -> CompleteRequest:
    return CompleteRequest(order_id=int(view.id), buyer=buyer, actor=buyer or "boss")


async def refused(work: Any, kind: type[HoldfastError]) -> str:
    with pytest.raises(kind) as caught:
        await work
    return caught.value.detail


# -- shipped and arrived ----------------------------------------------------------------------------------------------


async def test_a_paid_order_is_shipped_and_completed_and_each_step_is_told_once(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    await probe(system, topology.ORDER_EVENTS, "order.shipped", "shipped")
    await probe(system, topology.ORDER_EVENTS, "order.completed", "completed")
    view = await paid(system)

    shipped = [await system.orders.ship(shipping(view)) for _ in range(3)]
    assert {(each.status, each.tracking) for each in shipped} == {(OrderStatus.SHIPPED, "SF 123")}
    assert shipped[0].complete_by is not None
    completed = [await system.orders.complete(arrival(view)) for _ in range(3)]
    assert {each.status for each in completed} == {OrderStatus.COMPLETED}

    assert await waiting(system, OrderShipped, "shipped") == [OrderShipped(order_id=int(view.id), tracking="SF 123")]
    assert await waiting(system, OrderCompleted, "completed") == [OrderCompleted(order_id=int(view.id))]
    entries = await system.orders.timeline(int(view.id), "ann")
    assert [(entry.from_status, entry.to_status, entry.actor, entry.note) for entry in entries] == [
        (None, "pending_payment", "ann", ""),
        ("pending_payment", "paid", "payment", ""),
        ("paid", "shipped", "staff", "SF 123"),
        ("shipped", "completed", "ann", ""),
    ]
    assert (await system.orders.timeline(int(view.id), None))[2].actor == "boss"
    assert await drained(system, topology.ORDER_ARRIVING_QUEUE)
    assert (await system.transport.stats(topology.ORDER_ARRIVING_QUEUE)).delayed == 0
    await level_becomes(system, held=0, sold=1)
    for told in ("order.shipped", "order.completed"):
        await lose(system, told)  # nobody listens to the probes
    await clean(system)


async def test_an_order_ships_only_once_paid_and_under_one_tracking(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    assert "pending_payment" in await refused(system.orders.ship(shipping(view)), NotShippable)
    await pay(system, view)
    await becomes(system, view, OrderStatus.PAID)
    assert "paid" in await refused(system.orders.complete(arrival(view)), NotCompletable)
    await system.orders.ship(shipping(view))
    await refused(system.orders.ship(shipping(view, "another")), NotShippable)
    await refused(system.orders.ship(ShipRequest(order_id=1, tracking="x", actor="boss")), OrderNotFound)
    assert (await system.orders.get(int(view.id), "ann")).tracking == "SF 123"
    await refused(system.orders.cancel(int(view.id), "ann"), NotCancellable)


async def test_another_buyer_cannot_complete_an_order_nor_learn_of_it(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await paid(system)
    await system.orders.ship(shipping(view))
    await refused(system.orders.complete(arrival(view, "eve")), OrderNotFound)
    await refused(system.orders.timeline(int(view.id), "eve"), OrderNotFound)
    assert await status(system, view) is OrderStatus.SHIPPED
    assert (await system.orders.complete(arrival(view, None))).status is OrderStatus.COMPLETED


@pytest.mark.parametrize("lost", [False, True], ids=["by its message", "by the sweeper"])
async def test_a_shipped_order_completes_by_itself_when_its_time_is_over_and_not_before(
    start_system: StartSystem, clock: ManualClock, lost: bool
) -> None:
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 5)
    view = await paid(system)
    await system.orders.ship(shipping(view))
    if lost:
        assert await lose(system, "order.arriving") == 1
    assert not await system.orders.arrive(int(view.id))
    clock.advance(7 * DAY_S - 1)
    assert not await system.orders.arrive(int(view.id))
    assert await status(system, view) is OrderStatus.SHIPPED

    async def arrived() -> bool:
        return await status(system, view) is OrderStatus.COMPLETED

    await in_time(clock, arrived, "the order is completed")
    assert (await system.orders.timeline(int(view.id), "ann"))[-1].actor == ITSELF
    await clean_in_time(system, clock)


async def test_money_told_again_leaves_a_shipped_order_alone(system: System) -> None:
    """What comes late is the message, not the money."""
    await stock_up(system, "SKU-1", 5)
    view = await paid(system)
    for step in (system.orders.ship(shipping(view)), system.orders.complete(arrival(view))):
        moved = await step
        told = PaymentSucceeded(
            payment_id=int(view.payment.id),
            order_id=int(view.id),
            amount_minor=view.amount_minor,
            currency="CNY",
            captured_us=system.clock.now_us(),
        )
        await system.publisher.publish(topology.PAY, topology.KEY_PAY_SUCCESS, told)

        async def handled() -> bool:
            return await drained(system, topology.PAY_SUCCESS_QUEUE)

        await eventually(handled, "the message is handled")
        assert await status(system, view) is moved.status
    assert await count(system, "SELECT id FROM payment_refund") == 0
    await clean(system)


# -- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_sku_has_its_own_time_to_pay_and_the_shortest_of_an_order_counts(
    start_system: StartSystem, clock: ManualClock
) -> None:
    system = await start_system(clock=clock, work=False)
    await rule(system, "SKU-1", time_out_ms=10_000)
    await rule(system, "SKU-2", time_out_ms=20_000)
    await stock_up(system, "SKU-3", 5)

    async def seconds(*skus: str) -> float:
        lines = tuple(OrderLine(sku=sku, quantity=1) for sku in skus)
        request = PlaceRequest(buyer="ann", idempotency_key="-".join(skus), lines=lines)
        view = placed_view(await system.orders.place(request))
        (row,) = await waiting_deadline(system, view)
        return (row - clock.now_us()) / US_PER_S

    assert await seconds("SKU-3") == TIME_OUT_S
    assert await seconds("SKU-2", "SKU-3") == 20
    assert await seconds("SKU-2", "SKU-1", "SKU-3") == 10


async def waiting_deadline(system: System, view: OrderView) -> list[int]:
    """The instants at which messages of the order's deadline wait, after a look that its row says the same."""
    pending = await system.messaging.pending(cancel_key=f"order.due:{view.id}")
    instants = [message.due_us for message in pending]
    found = await count(
        system, "SELECT id FROM order_order WHERE id = :id AND pay_by_us = :us", id=int(view.id), us=instants[0]
    )
    assert found == 1
    return instants


async def test_a_longer_time_to_pay_moves_the_deadline_of_order_payment_and_message(
    start_system: StartSystem, clock: ManualClock
) -> None:
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    later_us = clock.now_us() + 2 * TIME_OUT_S * US_PER_S
    wanted = ExtendRequest(order_id=int(view.id), pay_by_us=later_us, actor="boss")
    extended = [await system.orders.extend(wanted) for _ in range(2)]
    assert extended[0] == extended[1]
    assert extended[0].payment.pay_url != view.payment.pay_url
    assert await waiting_deadline(system, view) == [later_us]

    clock.advance(1.5 * TIME_OUT_S)
    await pay(system, extended[0])
    await becomes(system, view, OrderStatus.PAID)
    await clean_in_time(system, clock)


async def test_an_extended_order_closes_at_its_new_deadline(start_system: StartSystem, clock: ManualClock) -> None:
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    later_us = clock.now_us() + 2 * TIME_OUT_S * US_PER_S
    await system.orders.extend(ExtendRequest(order_id=int(view.id), pay_by_us=later_us, actor="boss"))
    clock.advance(2 * TIME_OUT_S - 1)
    await system.orders.sweep(0)
    assert await status(system, view) is OrderStatus.PENDING_PAYMENT

    async def closed() -> bool:
        return await status(system, view) is OrderStatus.CLOSED

    await in_time(clock, closed, "the order is closed")
    await clean_in_time(system, clock)
    assert (await level(system)).available == 5


async def test_a_deadline_is_never_shortened_nor_moved_beyond_the_cap_nor_given_to_the_dead(
    start_system: StartSystem, clock: ManualClock, settings: Settings
) -> None:
    system = await start_system(with_orders(settings, extend_ms_max=300_000), clock=clock, work=False)
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    placed_us = clock.now_us()

    def until(seconds: int, order_id: int = int(view.id)) -> ExtendRequest:
        return ExtendRequest(order_id=order_id, pay_by_us=placed_us + seconds * US_PER_S, actor="boss")

    assert "never shortened" in await refused(system.orders.extend(until(TIME_OUT_S - 1)), NotExtendable)
    assert "at the latest" in await refused(system.orders.extend(until(301)), NotExtendable)
    await refused(system.orders.extend(until(100, 1)), OrderNotFound)
    assert await waiting_deadline(system, view) == [placed_us + TIME_OUT_S * US_PER_S]
    await system.orders.extend(until(300))
    clock.advance(300)
    # Nobody closed it yet; at its instant it is dead all the same.
    await refused(system.orders.extend(until(300)), NotExtendable)


# -- limits and prices ------------------------------------------------------------------------------------------------


async def test_one_buyer_has_no_more_units_than_one_may_over_all_his_orders(system: System) -> None:
    await rule(system, buyer_max=3)
    await stock_up(system, "SKU-2", 5)
    first = await order(system, "ann", quantity=2)
    detail = await refused(system.orders.place(wish("ann", quantity=2, key="more")), LimitReached)
    assert "3 of 'SKU-1'" in detail
    assert "you have 2" in detail
    await order(system, "bob", quantity=3)
    await system.orders.place(wish("ann", "SKU-2", quantity=5, key="other"))
    placed_view(await system.orders.place(wish("ann", quantity=1, key="last")))
    await refused(system.orders.place(wish("ann", quantity=1, key="one more")), LimitReached)
    await system.orders.cancel(int(first.id), "ann")  # what he gave back he may have again
    await system.orders.place(wish("ann", quantity=2, key="again"))
    await clean(system)


async def test_a_buyer_who_asks_often_at_once_gets_his_limit(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, settings, work=False)
    await rule(systems[0], units=50, buyer_max=4)
    answers = await asyncio.gather(
        *(systems[number % len(systems)].orders.place(wish("ann", key=f"{number}")) for number in range(20)),
        return_exceptions=True,
    )
    kinds = [type(answer).__name__ for answer in answers]
    assert (kinds.count("Placed"), kinds.count("LimitReached")) == (4, 16)
    assert (await level(systems[0])).held == 4


async def test_one_order_has_no_more_units_than_an_order_may(system: System) -> None:
    await rule(system, order_max=2)
    assert "at most 2" in await refused(system.orders.place(wish("ann", quantity=3)), LimitReached)
    await order(system, "ann", quantity=2)


async def test_a_price_other_than_the_buyer_saw_is_refused_and_nothing_is_held(system: System) -> None:
    await stock_up(system, "SKU-1", 5)

    def seen(price_minor: int, key: str) -> PlaceRequest:
        line = OrderLine(sku="SKU-1", quantity=1, price_minor=price_minor)
        return PlaceRequest(buyer="ann", idempotency_key=key, lines=(line,))

    detail = await refused(system.orders.place(seen(PRICE_MINOR - 1, "old")), PriceChanged)
    assert f"costs {PRICE_MINOR} now, not {PRICE_MINOR - 1}" in detail
    assert (await level(system)).held == 0
    await system.orders.place(seen(PRICE_MINOR, "old"))  # the key was left unused


async def test_what_costs_nothing_is_paid_at_once_and_its_units_are_sold(system: System) -> None:
    await rule(system, "GIFT", units=2, price_minor=0)
    view = await order(system, "ann", "GIFT")
    assert (view.status, view.amount_minor, view.payment.pay_url) == (OrderStatus.PAID, 0, None)
    await level_becomes(system, "GIFT", held=0, sold=1)
    assert [entry.to_status for entry in await system.orders.timeline(int(view.id), "ann")] == [
        "pending_payment",
        "paid",
    ]
    again = await system.orders.place(wish("ann", "GIFT"))
    assert again.replayed
    assert (await system.orders.ship(shipping(view))).status is OrderStatus.SHIPPED
    await refused(system.orders.cancel(int(view.id), "ann"), NotCancellable)
    assert await count(system, "SELECT id FROM payment_order") == 0
    await clean(system)


# -- carts ------------------------------------------------------------------------------------------------------------


async def put(system: System, buyer: str, sku: str, quantity: int) -> list[Item]:
    return await system.carts.put(PutItem(buyer=buyer, sku=sku, quantity=quantity))


def from_cart(buyer: str, key: str = "cart-1") -> PlaceRequest:
    return PlaceRequest(buyer=buyer, idempotency_key=key, lines=(), from_cart=True)


async def test_a_cart_is_ordered_as_it_is_and_then_empty(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    await stock_up(system, "SKU-2", 5)
    await put(system, "ann", "SKU-2", 1)
    await put(system, "ann", "SKU-1", 4)
    assert await put(system, "ann", "SKU-1", 2) == [Item(sku="SKU-1", quantity=2), Item(sku="SKU-2", quantity=1)]

    placed = await system.orders.place(from_cart("ann"))
    view = placed_view(placed)
    assert [(line.sku, line.quantity) for line in view.lines] == [("SKU-1", 2), ("SKU-2", 1)]
    assert view.amount_minor == 3 * PRICE_MINOR

    async def empty() -> bool:
        return await system.carts.read("ann") == []

    await eventually(empty, "the cart is empty")
    again = await system.orders.place(from_cart("ann"))
    assert (again.replayed, again.body) == (True, placed.body)
    await refused(system.orders.place(from_cart("ann", "cart-2")), CartEmpty)
    await clean(system)


async def test_a_cart_that_cannot_be_ordered_stays_as_it_is(system: System) -> None:
    await stock_up(system, "SKU-1", 1)
    held = await put(system, "ann", "SKU-1", 2)
    await refused(system.orders.place(from_cart("ann")), SoldOut)
    await put(system, "bob", "NOT SOLD HERE".replace(" ", "-"), 1)
    await refused(system.orders.place(from_cart("bob")), HoldfastError)
    assert await system.carts.read("ann") == held


async def test_a_cart_holds_only_so_much(system: System) -> None:
    for number in range(ITEMS_MAX):
        await put(system, "ann", f"SKU-{number}", 1)
    await refused(put(system, "ann", "ONE-MORE", 1), CartFull)
    assert len(await put(system, "ann", "SKU-7", 9)) == ITEMS_MAX
    assert len(await put(system, "ann", "SKU-7", 0)) == ITEMS_MAX - 1
    await put(system, "ann", "ONE-MORE", 1)


# -- lists ------------------------------------------------------------------------------------------------------------


async def test_orders_are_listed_page_by_page_each_once_and_to_their_buyer_only(system: System) -> None:
    await stock_up(system, "SKU-1", 50)
    mine = [placed_view(await system.orders.place(wish("ann", key=str(number)))).id for number in range(7)]
    others = [placed_view(await system.orders.place(wish("bob", key=str(number)))).id for number in range(2)]
    await system.orders.cancel(int(mine[0]), "ann")

    async def listed(buyer: str | None, wanted: OrderStatus | None = None) -> list[str]:
        seen: list[str] = []
        before = 1 << 62
        while page := await system.orders.page(buyer=buyer, status=wanted, before=before, limit=3):
            seen += [view.id for view in page]
            before = int(page[-1].id)
        return seen

    assert await listed("ann") == mine[::-1]
    assert await listed("eve") == []
    assert await listed(None) == sorted(mine + others, key=int, reverse=True)
    assert await listed("ann", OrderStatus.CANCELLED) == mine[:1]


async def test_staff_cancels_an_unpaid_order_in_his_own_name(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    assert (await system.orders.cancel(int(view.id), None, "boss")).status is OrderStatus.CANCELLED
    assert (await system.orders.timeline(int(view.id), None))[-1].actor == "boss"
    await level_becomes(system, held=0, available=5)
    await clean(system)


async def test_a_wish_without_lines_and_without_a_cart_is_refused(system: System) -> None:
    with pytest.raises(InvalidInput):
        await system.orders.place(msgspec.structs.replace(from_cart("ann"), from_cart=False))


# -- money back -------------------------------------------------------------------------------------------------------


async def give_back(system: System, view: OrderView, amount_minor: int | None = None, key: str = "back-1") -> None:
    wish = RefundWish(
        key=key, actor="boss", reason="broken", payment_id=int(view.payment.id), amount_minor=amount_minor
    )
    await system.refunds.request(wish)


async def refunded_is(system: System, view: OrderView, amount_minor: int) -> None:
    async def reached() -> bool:
        return (await system.orders.get(int(view.id), "ann")).refunded_minor == amount_minor

    await eventually(reached, f"the order knows of {amount_minor} given back")


@pytest.mark.parametrize("state", [OrderStatus.PAID, OrderStatus.SHIPPED, OrderStatus.COMPLETED])
async def test_an_order_whose_whole_money_is_given_back_is_refunded(system: System, state: OrderStatus) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await paid(system)
    if state is not OrderStatus.PAID:
        await system.orders.ship(shipping(view))
    if state is OrderStatus.COMPLETED:
        await system.orders.complete(arrival(view))
    await give_back(system, view)
    await becomes(system, view, OrderStatus.REFUNDED)
    assert (await system.orders.get(int(view.id), "ann")).refunded_minor == view.amount_minor
    path = [(entry.from_status, entry.to_status) for entry in await system.orders.timeline(int(view.id), "ann")]
    assert path[-2:] == [(state, OrderStatus.REFUNDING), (OrderStatus.REFUNDING, OrderStatus.REFUNDED)]
    assert (await system.transport.stats(topology.ORDER_ARRIVING_QUEUE)).delayed == 0
    await clean(system)


async def test_a_part_given_back_leaves_the_order_where_it_is_until_nothing_is_left(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await paid(system)
    await give_back(system, view, PRICE_MINOR // 4, "back-1")
    await refunded_is(system, view, PRICE_MINOR // 4)
    assert await status(system, view) is OrderStatus.PAID
    assert (await system.orders.ship(shipping(view))).status is OrderStatus.SHIPPED
    await give_back(system, view, None, "back-2")
    await becomes(system, view, OrderStatus.REFUNDED)
    assert (await system.orders.get(int(view.id), "ann")).refunded_minor == PRICE_MINOR
    await clean(system)


async def test_word_of_refunds_may_come_twice_and_in_any_order(start_system: StartSystem) -> None:
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    await pay(system, view)
    service = system.orders
    facts: dict[str, Any] = {
        "payment_id": int(view.payment.id),
        "order_id": int(view.id),
        "captured_minor": PRICE_MINOR,
        "currency": "CNY",
        "key_reason": "staff",
    }

    def given(refund_id: int, amount_minor: int, sum_minor: int) -> RefundSucceeded:
        return RefundSucceeded(refund_id=refund_id, amount_minor=amount_minor, refunded_minor=sum_minor, **facts)

    opened = RefundOpened(
        refund_id=2, payment_id=int(view.payment.id), order_id=int(view.id), amount_minor=600, full=True
    )
    paid_event = PaymentSucceeded(
        payment_id=int(view.payment.id),
        order_id=int(view.id),
        amount_minor=PRICE_MINOR,
        currency="CNY",
        captured_us=view_created(view),
    )
    async with system.database.transaction() as tx:
        with pytest.raises(Retry):  # before the word of the payment itself: it comes again
            await service.fulfilment.refunded(tx, [given(2, 600, PRICE_MINOR)])
        with pytest.raises(Retry):
            await service.fulfilment.refunding(tx, [opened])
    assert (await service.get(int(view.id), "ann")).refunded_minor == 0
    async with system.database.transaction() as tx:
        await service.transitions.pay(tx, [paid_event])
    for _ in range(2):
        async with system.database.transaction() as tx:
            await service.fulfilment.refunded(tx, [given(2, 600, PRICE_MINOR), given(1, 400, 400)])
        async with system.database.transaction() as tx:
            await service.fulfilment.refunding(tx, [opened])
            await service.fulfilment.refunded(tx, [given(1, 400, 400)])
        seen = await service.get(int(view.id), "ann")
        assert (seen.status, seen.refunded_minor) == (OrderStatus.REFUNDED, PRICE_MINOR)
    assert await count(system, "SELECT id FROM order_log WHERE order_id = :id", id=int(view.id)) == 4


def view_created(view: OrderView) -> int:
    """When the order was placed, in microseconds."""
    return microseconds(datetime.fromisoformat(view.created_at))


async def test_late_money_given_back_leaves_a_cancelled_order_cancelled(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    await system.orders.cancel(int(view.id), "ann")
    await deliver(system, signed_notice(system, view, system.clock.now_us()))
    await refunded_is(system, view, PRICE_MINOR)
    assert await status(system, view) is OrderStatus.CANCELLED
    await clean(system)
