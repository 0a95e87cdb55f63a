"""The verbs that end an order's waiting: pay, cancel, close. Each is one conditional UPDATE; the second comer loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderPaid, PaymentSucceeded, RefundRequested
from holdfast.services.orders import store
from holdfast.services.orders.model import CancelRequest, NotCancellable, OrderNotFound, OrderStatus, OrderView
from holdfast.services.orders.needs import Payments
from holdfast.services.orders.place import deadline_key

LATE = "late"
Traces = Mapping[int, Mapping[str, str]]  # order id -> the trace that made it move


class Transitions:
    """Moves orders; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock, ids: IdSource, outbox: Outbox, payments: Payments) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox
        self._payments = payments

    async def pay(self, tx: Tx, events: Sequence[PaymentSucceeded]) -> None:
        """Mark orders paid whose money came in time; money no order waits for any more is to be refunded.

        In time means captured, by the provider's clock, not later than the order's deadline: a hold is dead at its
        instant, also when nobody closed the order yet. An order whose money came late is closed here and now.
        """
        orders = await store.lock_orders(tx, {event.order_id for event in events})
        paid: dict[int, PaymentSucceeded] = {}
        late: list[PaymentSucceeded] = []
        for event in events:
            order = orders.get(event.order_id)
            if (
                order is not None
                and order.status == OrderStatus.PENDING_PAYMENT
                and event.captured_us <= order.pay_by_us
            ):
                paid[event.order_id] = event
            elif order is None or order.status != OrderStatus.PAID:
                late.append(event)
        await self._move(tx, list(paid), OrderStatus.PAID, "payment")
        # What is not accepted here and now, payments will tell again, until a refund takes charge of it.
        await self._payments.accept(tx, {event.payment_id for event in events} - {event.payment_id for event in late})
        over = {event.order_id for event in late} - set(paid)
        closed = await self._move(tx, over, OrderStatus.CLOSED, "late payment")
        drafts = [
            Draft(
                exchange=topology.ORDER_EVENTS,
                routing_key=topology.KEY_ORDER_PAID,
                body=OrderPaid(order_id=event.order_id, payment_id=event.payment_id),
                trace=tx.trace_of(event),
            )
            for event in paid.values()
        ] + [
            Draft(
                exchange=topology.PAY,
                routing_key=topology.KEY_PAY_REFUND,
                body=RefundRequested(payment_id=event.payment_id, order_id=event.order_id, reason=LATE),
                trace=tx.trace_of(event),
            )
            for event in late
        ]
        traces = {event.order_id: tx.trace_of(event) for event in events}
        await self._outbox.add_all(tx, drafts + _told_closed(closed, OrderStatus.CLOSED, traces))

    async def cancel(self, tx: Tx, requests: Sequence[CancelRequest]) -> list[OrderView | HoldfastError]:
        """Cancel buyers' own unpaid orders; cancelling a cancelled one again gives the same answer and does nothing.

        Answers `OrderNotFound` for another buyer's order, `NotCancellable` for one that is paid or closed.
        """
        orders = await store.lock_orders(tx, {request.order_id for request in requests})
        refusals: dict[int, HoldfastError] = {}
        wanted: set[int] = set()
        for index, request in enumerate(requests):
            order = orders.get(request.order_id)
            if order is None or order.buyer != request.buyer:
                refusals[index] = OrderNotFound()
            elif order.status == OrderStatus.PENDING_PAYMENT:
                wanted.add(request.order_id)
            elif order.status != OrderStatus.CANCELLED:
                refusals[index] = NotCancellable(f"the order is {order.status}; it cannot be cancelled any more")
        traces = {request.order_id: tx.trace_of(request) for request in requests}
        cancelled = await self._end(tx, wanted, OrderStatus.CANCELLED, "buyer", traces)
        views = await store.read_views(tx, set(orders), None)
        answers: list[OrderView | HoldfastError] = []
        for index, request in enumerate(requests):
            if index in refusals:
                answers.append(refusals[index])
            elif request.order_id in wanted and request.order_id not in cancelled:
                answers.append(NotCancellable("the order is being paid; it cannot be cancelled any more"))
            else:
                answers.append(views[request.order_id])
        return answers

    async def close(self, tx: Tx, order_ids: Sequence[int]) -> list[bool | HoldfastError]:
        """Close orders whose deadline has passed and whose trade cannot be paid; says for each if it has ended."""
        orders = await store.lock_orders(tx, set(order_ids))
        now_us = self._clock.now_us()
        due = {
            order.id
            for order in orders.values()
            if order.status == OrderStatus.PENDING_PAYMENT and order.pay_by_us <= now_us
        }
        traces = {order_id: tx.trace_of(order_id) for order_id in order_ids}
        closed = await self._end(tx, due, OrderStatus.CLOSED, "deadline", traces)
        ended = {order.id for order in orders.values() if order.status != OrderStatus.PENDING_PAYMENT}
        return [order_id in closed | ended for order_id in order_ids]

    async def _end(self, tx: Tx, order_ids: set[int], to: OrderStatus, actor: str, traces: Traces) -> set[int]:
        """End unpaid orders together with their payment orders; one whose payment succeeded meanwhile stays open."""
        if not order_ids:
            return set()
        moved = await self._move(tx, await self._payments.end(tx, order_ids), to, actor)
        await self._outbox.add_all(tx, _told_closed(moved, to, traces))
        return set(moved)

    async def _move(self, tx: Tx, order_ids: set[int] | list[int], to: OrderStatus, actor: str) -> list[int]:
        if not order_ids:
            return []
        now_us = self._clock.now_us()
        moved = await store.move(tx, order_ids, OrderStatus.PENDING_PAYMENT, to, now_us)
        if moved:
            entries = [
                {
                    "id": self._ids.next(),
                    "order_id": order_id,
                    "from_status": OrderStatus.PENDING_PAYMENT.value,
                    "to_status": to.value,
                    "actor": actor,
                    "at_us": now_us,
                }
                for order_id in moved
            ]
            await store.insert_entries.many(tx, entries)
            await self._outbox.cancel(tx, *(deadline_key(order_id) for order_id in moved))
            tx.on_commit(lambda: observe.orders_moved.labels(to.value).inc(len(moved)))
        return moved


def _told_closed(order_ids: Sequence[int], status: OrderStatus, traces: Traces) -> list[Draft]:
    return [
        Draft(
            exchange=topology.ORDER_EVENTS,
            routing_key=topology.KEY_ORDER_CLOSED,
            body=OrderClosed(order_id=order_id, status=status.value),
            trace=traces.get(order_id, {}),
        )
        for order_id in order_ids
    ]
