"""Rows G4, G6, G10, G12, G14, H18, H19, H29 and H40 of the capability table, checked as they stand there, on SQL."""
# ruff: noqa: N802  # the rows keep their names

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock
from holdfast.db.database import Tx
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderCreated, OrderDue, PaymentSucceeded, StockLocked
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.orders.model import NotCancellable, OrderLine, OrderStatus, Placed, PlaceRequest
from holdfast.services.orders.place import PlaceOrders
from holdfast.services.payments.model import ENDED, Verdict
from holdfast.services.payments.sandbox_book import TradeClosed
from holdfast.services.stock.model import DEDUCTED, HELD, RELEASED
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    becomes,
    clean,
    clean_in_time,
    count,
    deliver,
    detail_states,
    drained,
    level,
    level_becomes,
    one_by_one,
    order,
    pay,
    pay_at_sandbox,
    placed_view,
    probe,
    rows,
    signed_notice,
    status,
    stock_up,
    two_systems,
    waiting,
    wish,
)


class Forced(Exception):
    """Raised inside the transaction of an order, after everything was written."""


def fail_after_writing(monkeypatch: pytest.MonkeyPatch, doomed: set[str]) -> None:
    """Make the transaction of these buyers' orders fail when its rows and messages are written."""
    write = PlaceOrders._write

    async def write_and_fail(self: PlaceOrders, tx: Tx, drafts: Sequence[Any]) -> list[Placed]:
        placed = await write(self, tx, drafts)
        if any(draft.request.buyer in doomed for draft in drafts):
            raise Forced
        return placed

    monkeypatch.setattr(PlaceOrders, "_write", write_and_fail)


async def publish_at_once(systems: Sequence[System], exchange: str, key: str, body: msgspec.Struct, times: int) -> None:
    """Send the same body so many times, each a message of its own, spread over the systems."""
    senders = [systems[number % len(systems)].publisher for number in range(times)]
    message_ids = await asyncio.gather(*(sender.publish(exchange, key, body) for sender in senders))
    assert len(set(message_ids)) == times


async def test_G4_create_order_to_delay_queue(start_system: StartSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 100)
    await probe(system, topology.ORDER_EVENTS, topology.KEY_ORDER_CREATE)
    doomed = {f"buyer-{number}" for number in range(0, 100, 5)}
    fail_after_writing(monkeypatch, doomed)

    buyers = [f"buyer-{number}" for number in range(100)]
    outcomes = await asyncio.gather(*(system.orders.place(wish(buyer)) for buyer in buyers), return_exceptions=True)

    refused = {buyer for buyer, outcome in zip(buyers, outcomes, strict=True) if isinstance(outcome, Forced)}
    placed = {outcome.order_id for outcome in outcomes if isinstance(outcome, Placed)}
    assert refused == doomed
    assert len(placed) == 80
    created = await waiting(system, OrderCreated)
    assert len(created) == 80
    assert {message.order_id for message in created} == placed
    assert {message.buyer for message in created} == set(buyers) - doomed
    due = await waiting(system, OrderDue, topology.ORDER_DUE_QUEUE)
    assert len(due) == 80
    assert {message.order_id for message in due} == placed
    assert await count(system, "SELECT id FROM order_order") == 80
    # Each waits for its order's deadline: never a moment less, and hardly more.
    late = await rows(
        system,
        """SELECT hf_message.due_us - pay_by_us AS late_us
           FROM hf_message JOIN order_order ON cancel_key = 'order.due:' || CAST(order_order.id AS TEXT)""",
    )
    assert len(late) == 80
    assert all(0 <= row["late_us"] <= US_PER_S for row in late)
    assert (await level(system)).held == 80


async def test_G6_close_listener(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 2)
    unpaid = await order(system, "ann")
    paid = await order(system, "bob")
    await pay(system, paid)
    await becomes(system, paid, OrderStatus.PAID, "bob")
    # The message of a paid order may come all the same: the order is read again and stays paid.
    body = OrderDue(order_id=int(paid.id))
    await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_DUE, body, delay_ms=60_000)
    queue = await system.transport.stats(topology.ORDER_DUE_QUEUE)
    assert (queue.ready, queue.unacked, queue.delayed) == (0, 0, 2)

    clock.advance(60)

    await becomes(system, unpaid, OrderStatus.CLOSED)
    await level_becomes(system, available=1, held=0, sold=1)

    async def empty() -> bool:
        return (await system.transport.stats(topology.ORDER_DUE_QUEUE)).total == 0

    await eventually(empty, "the close queue is empty")
    assert await status(system, paid, "bob") is OrderStatus.PAID
    await clean_in_time(system, clock)


async def test_G10_stock_lock_publishes_work_order(start_system: StartSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    system = await start_system(work=False)
    for sku, warehouse, quantity in (
        ("SKU-A", "east", 5),
        ("SKU-B", "east", 2),
        ("SKU-B", "west", 5),
        ("SKU-C", "west", 3),
    ):
        await stock_up(system, sku, quantity, warehouse)
    await probe(system, topology.STOCK_EVENTS, topology.KEY_STOCK_LOCKED)
    lines = (
        OrderLine(sku="SKU-A", quantity=2),
        OrderLine(sku="SKU-B", quantity=4),  # more than either warehouse's share: has to be split
        OrderLine(sku="SKU-C", quantity=3),
    )
    fail_after_writing(monkeypatch, {"bob"})
    with pytest.raises(Forced):
        await system.orders.place(PlaceRequest(buyer="bob", idempotency_key="bob-1", lines=lines))
    assert await waiting(system, StockLocked) == []
    assert await count(system, "SELECT id FROM stock_task UNION ALL SELECT id FROM stock_task_detail") == 0

    seen_before_commit: list[StockLocked] = []
    write = PlaceOrders._write

    async def write_and_look(self: PlaceOrders, tx: Tx, drafts: Sequence[Any]) -> list[Placed]:
        placed = await write(self, tx, drafts)
        seen_before_commit.extend(await waiting(system, StockLocked))
        return placed

    monkeypatch.setattr(PlaceOrders, "_write", write_and_look)
    placed = await system.orders.place(PlaceRequest(buyer="ann", idempotency_key="ann-1", lines=lines))

    assert seen_before_commit == []
    (task,) = await rows(system, "SELECT id, order_id FROM stock_task")
    assert task["order_id"] == placed.order_id
    details = await rows(
        system, "SELECT id, task_id, order_id, sku, warehouse, quantity, status FROM stock_task_detail ORDER BY id"
    )
    assert [(row["sku"], row["warehouse"], row["quantity"]) for row in details] == [
        ("SKU-A", "east", 2),
        ("SKU-B", "east", 2),
        ("SKU-B", "west", 2),
        ("SKU-C", "west", 3),
    ]
    assert {(row["task_id"], row["order_id"], row["status"]) for row in details} == {
        (task["id"], placed.order_id, HELD)
    }
    told = await waiting(system, StockLocked)
    assert len(told) == len(details)
    assert {
        (each.detail_id, each.task_id, each.order_id, each.sku, each.warehouse, each.quantity) for each in told
    } == {
        (row["id"], row["task_id"], row["order_id"], row["sku"], row["warehouse"], row["quantity"]) for row in details
    }


async def test_G12_decide_by_work_order_status(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, one_by_one(settings), work=False)
    system = systems[0]
    await stock_up(system, "SKU-1", 10)
    await order(system, "bob", quantity=4)  # keeps its units, whatever is given back for the other
    mine = await order(system, "ann", quantity=3)
    await system.orders.cancel(int(mine.id), "ann")
    body = OrderClosed(order_id=int(mine.id), status=OrderStatus.CANCELLED)
    await publish_at_once(systems, topology.ORDER_EVENTS, topology.KEY_ORDER_CLOSED, body, 50)

    for each in systems:
        each.work()

    async def all_handled() -> bool:
        return await drained(system, topology.STOCK_RELEASE_QUEUE)

    await eventually(all_handled, "all 51 messages are handled")
    # The inbox hid none of them: each had its turn, and the state of the work order decided.
    assert await count(system, "SELECT message_id FROM hf_inbox WHERE consumer = 'stock.release'") == 51
    assert await detail_states(system, mine.id) == [RELEASED]
    assert await count(system, "SELECT id FROM stock_ledger WHERE kind = 'release'") == 1
    now = await level(system)
    assert (now.available, now.held, now.sold, now.total) == (6, 4, 0, 10)
    await clean(system)


async def test_G14_order_close_unlocks_stock(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock)
    for sku in ("SKU-1", "SKU-2"):
        await stock_up(system, sku, 3, "east")
        await stock_up(system, sku, 3, "west")
    lines = (OrderLine(sku="SKU-1", quantity=2), OrderLine(sku="SKU-2", quantity=2))
    views = {
        buyer: placed_view(
            await system.orders.place(PlaceRequest(buyer=buyer, idempotency_key=f"of-{buyer}", lines=lines))
        )
        for buyer in ("ann", "bob")
    }
    unpaid, paid = views["ann"], views["bob"]
    await pay(system, paid)

    async def deducted() -> bool:
        return set(await detail_states(system, paid.id)) == {DEDUCTED}

    await eventually(deducted, "the paid order's units are sold")
    assert await detail_states(system, unpaid.id) == [HELD, HELD]
    assert len(await detail_states(system, paid.id)) == 4  # each of its lines came from both warehouses

    clock.advance(60)

    async def released() -> bool:
        return await detail_states(system, unpaid.id) == [RELEASED, RELEASED]

    await eventually(released, "every detail of the closed order is given back")
    # Even a message that wrongly calls the paid order closed takes nothing away from it.
    body = OrderClosed(order_id=int(paid.id), status=OrderStatus.CLOSED)
    await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_CLOSED, body)

    async def handled() -> bool:
        return await drained(system, topology.STOCK_RELEASE_QUEUE)

    await eventually(handled, "the wrong message is handled")
    assert set(await detail_states(system, paid.id)) == {DEDUCTED}
    levels = await system.stock.levels()
    for sku in ("SKU-1", "SKU-2"):
        assert sum(each.sold for each in levels if each.sku == sku) == 2
        assert sum(each.available for each in levels if each.sku == sku) == 4
    await clean_in_time(system, clock)


async def test_H18_business_status_idempotency(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, one_by_one(settings), work=False)
    system = systems[0]
    await stock_up(system, "SKU-1", 10)
    view = await order(system, quantity=2)
    assert await deliver(system, await pay_at_sandbox(system, view)) is Verdict.APPLIED
    (told,) = await waiting(system, PaymentSucceeded, topology.PAY_SUCCESS_QUEUE)
    await publish_at_once(systems, topology.PAY, topology.KEY_PAY_SUCCESS, told, 99)

    for each in systems:
        each.work()

    await level_becomes(system, available=8, held=0, sold=2)

    async def all_handled() -> bool:
        return await drained(system, topology.PAY_SUCCESS_QUEUE) and await drained(system, topology.STOCK_DEDUCT_QUEUE)

    await eventually(all_handled, "all messages are handled")
    assert await count(system, "SELECT message_id FROM hf_inbox WHERE consumer = 'orders.pay'") == 100
    assert await count(system, "SELECT message_id FROM hf_inbox WHERE consumer = 'stock.deduct'") == 1
    entries = await rows(system, "SELECT from_status, to_status FROM order_log WHERE to_status <> 'pending_payment'")
    assert entries == [{"from_status": "pending_payment", "to_status": "paid"}]
    assert await count(system, "SELECT id FROM stock_ledger WHERE kind = 'deduct'") == 1
    assert await count(system, "SELECT id FROM payment_refund") == 0
    assert await status(system, view) is OrderStatus.PAID
    await clean(system)


@pytest.mark.parametrize("same_id_first", [True, False])
async def test_H19_refund_not_overwritten_in_the_shop(start_system: StartSystem, same_id_first: bool) -> None:
    """Money of a cancelled order is refunded; being told of that payment again changes neither order nor refund."""
    system = await start_system()
    await stock_up(system, "SKU-1", 5)
    view = await order(system, quantity=2)
    await system.orders.cancel(int(view.id), "ann")
    assert await deliver(system, signed_notice(system, view, system.clock.now_us())) is Verdict.APPLIED
    facts = "SELECT status, captured_minor, refunded_minor, changed_us FROM payment_order"

    async def refunded() -> bool:
        (now,) = await rows(system, facts)
        return bool(now["captured_minor"] == now["refunded_minor"] == 2 * PRICE_MINOR)

    await eventually(refunded, "the late money is refunded")
    await clean(system)
    before = await rows(system, facts)
    told = "SELECT message_id FROM hf_inbox WHERE consumer = 'orders.pay'"
    message_ids = {row["message_id"] for row in await rows(system, told)}
    first = min(message_ids)
    (payment,) = await rows(system, "SELECT id, captured_us FROM payment_order")
    body = PaymentSucceeded(
        payment_id=payment["id"],
        order_id=int(view.id),
        amount_minor=view.amount_minor,
        currency=view.currency,
        captured_us=payment["captured_us"],
    )

    async def handled() -> bool:
        return await drained(system, topology.PAY_SUCCESS_QUEUE) and await drained(system, topology.PAY_REFUND_QUEUE)

    for message_id in (first, "another") if same_id_first else ("another", first):
        await system.publisher.publish(topology.PAY, topology.KEY_PAY_SUCCESS, body, message_id=message_id)
        await eventually(handled, "the repeated message and what follows from it are handled")

    assert {row["message_id"] for row in await rows(system, told)} == message_ids | {"another"}
    await clean(system)
    assert await rows(system, facts) == before
    assert await rows(system, "SELECT amount_minor FROM sandbox_refund") == [{"amount_minor": 2 * PRICE_MINOR}]
    assert await count(system, "SELECT id FROM payment_refund") == 1
    assert await count(system, "SELECT id FROM order_log WHERE to_status = 'paid'") == 0
    assert await status(system, view) is OrderStatus.CANCELLED
    assert (await level(system)).available == 5


async def test_H29_cancel_order(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, one_by_one(settings))
    system = systems[0]
    await stock_up(system, "SKU-1", 5)
    view = await order(system, quantity=2)
    captured_us = system.clock.now_us()

    views = await asyncio.gather(
        *(systems[number % len(systems)].orders.cancel(int(view.id), "ann") for number in range(10))
    )

    assert {each.status for each in views} == {OrderStatus.CANCELLED}
    await level_becomes(system, available=5, held=0)
    assert await count(system, "SELECT id FROM stock_ledger WHERE kind = 'release'") == 1
    assert await count(system, "SELECT id FROM order_log WHERE to_status = 'cancelled'") == 1
    assert await rows(system, "SELECT status, captured_minor FROM payment_order") == [
        {"status": ENDED, "captured_minor": 0}
    ]
    with pytest.raises(TradeClosed):
        await pay_at_sandbox(system, view)

    # A notice that the provider signed before it closed the trade, and that comes only now, several times.
    notice = signed_notice(system, view, captured_us)
    verdicts = await asyncio.gather(*(deliver(systems[number % len(systems)], notice) for number in range(5)))
    assert set(verdicts) == {Verdict.APPLIED}

    async def refunded() -> bool:
        (payment,) = await rows(system, "SELECT captured_minor, refunded_minor FROM payment_order")
        return payment == {"captured_minor": 2 * PRICE_MINOR, "refunded_minor": 2 * PRICE_MINOR}

    await eventually(refunded, "the late money is refunded")
    await clean(system)
    assert await rows(system, "SELECT amount_minor FROM sandbox_refund") == [{"amount_minor": 2 * PRICE_MINOR}]
    assert await rows(system, "SELECT amount_minor, status FROM payment_refund") == [
        {"amount_minor": 2 * PRICE_MINOR, "status": "done"}
    ]
    assert await status(system, view) is OrderStatus.CANCELLED
    assert (await level(system)).available == 5
    assert (await system.orders.cancel(int(view.id), "ann")).status is OrderStatus.CANCELLED


async def test_H40_duplicate_form_submit(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, settings)
    system = systems[0]
    await stock_up(system, "SKU-1", 100)
    await probe(system, topology.ORDER_EVENTS, topology.KEY_ORDER_CREATE)

    answers = await asyncio.gather(
        *(systems[number % len(systems)].orders.place(wish("ann", quantity=2)) for number in range(20))
    )

    assert len({answer.order_id for answer in answers}) == 1
    assert len({answer.body for answer in answers}) == 1
    assert Counter(answer.replayed for answer in answers) == {False: 1, True: 19}
    assert await count(system, "SELECT id FROM order_order") == 1
    assert len(await waiting(system, OrderCreated)) == 1
    assert (await level(system)).held == 2
    for each in systems:
        with pytest.raises(KeyReused):
            await each.orders.place(wish("ann", quantity=3))
    assert await count(system, "SELECT id FROM order_order") == 1
    # The key is the buyer's own: another buyer's form with the same key is another order.
    other = await system.orders.place(wish("bob", quantity=2, key="key-of-ann"))
    assert other.order_id != answers[0].order_id
    # It outlives its order: what was answered is answered again, also when the order has ended long ago.
    await pay(system, placed_view(answers[0]))
    await becomes(system, placed_view(answers[0]), OrderStatus.PAID)
    with pytest.raises(NotCancellable):
        await system.orders.cancel(answers[0].order_id, "ann")
    again = await systems[-1].orders.place(wish("ann", quantity=2))
    assert (again.order_id, again.body, again.replayed) == (answers[0].order_id, answers[0].body, True)
