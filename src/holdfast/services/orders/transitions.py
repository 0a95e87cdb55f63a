"""The verbs that end an order's waiting: pay, cancel, close. Each is one conditional UPDATE; the second comer loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.clock import US_PER_MS, Clock, rfc3339
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderPaid, PaymentSucceeded, RefundRequested
from holdfast.services.orders import store
from holdfast.services.orders.model import (
    PAID_FOR,
    CancelRequest,
    ExtendRequest,
    NotCancellable,
    NotExtendable,
    OrderNotFound,
    OrderStatus,
    OrderView,
)
from holdfast.services.orders.moves import Moves
from holdfast.services.orders.needs import Payments
from holdfast.services.orders.place import deadline_key

LATE = "late"
Actors = Mapping[int, str]
Traces = Mapping[int, Mapping[str, str]]  # order id -> the trace that made it move


class Transitions:
    """Moves orders; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock, moves: Moves, outbox: Outbox, payments: Payments, extend_ms_max: int) -> None:
        self._clock = clock
        self._moves = moves
        self._extend_us_max = extend_ms_max * US_PER_MS
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
            elif order is None or order.status not in PAID_FOR:
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
        """Cancel unpaid orders; cancelling a cancelled one again gives the same answer and does nothing.

        Answers `OrderNotFound` for another buyer's order, `NotCancellable` for one that is paid or closed.
        """
        orders = await store.lock_orders(tx, {request.order_id for request in requests})
        refusals: dict[int, HoldfastError] = {}
        wanted: dict[int, str] = {}
        for index, request in enumerate(requests):
            order = orders.get(request.order_id)
            if order is None or request.buyer not in (None, order.buyer):
                refusals[index] = OrderNotFound()
            elif order.status == OrderStatus.PENDING_PAYMENT:
                wanted.setdefault(request.order_id, request.actor)
            elif order.status != OrderStatus.CANCELLED:
                refusals[index] = NotCancellable(f"the order is {order.status}; it cannot be cancelled any more")
        traces = {request.order_id: tx.trace_of(request) for request in requests}
        cancelled = await self._end(tx, set(wanted), OrderStatus.CANCELLED, wanted, traces)
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

    async def extend(self, tx: Tx, requests: Sequence[ExtendRequest]) -> list[OrderView | HoldfastError]:
        """Give unpaid orders a later deadline; the same deadline again gives the same answer.

        Answers `OrderNotFound`, or `NotExtendable`: the order does not wait for payment any more (at its instant it is
        dead, also when nobody closed it yet), the deadline is earlier than it was, or later than the cap allows.
        """
        orders = await store.lock_orders(tx, {request.order_id for request in requests})
        now_us = self._clock.now_us()
        wanted: dict[int, ExtendRequest] = {}
        refusals: dict[int, HoldfastError] = {}
        for index, request in enumerate(requests):
            order = orders.get(request.order_id)
            if order is None:
                refusals[index] = OrderNotFound()
                continue
            latest_us = order.created_us + self._extend_us_max
            before_us = wanted[order.id].pay_by_us if order.id in wanted else order.pay_by_us
            if order.status != OrderStatus.PENDING_PAYMENT or order.pay_by_us <= now_us:
                refusals[index] = NotExtendable("the order does not wait for payment any more")
            elif request.pay_by_us < before_us:
                refusals[index] = NotExtendable(f"the deadline is {rfc3339(before_us)} already; it is never shortened")
            elif request.pay_by_us > max(latest_us, before_us):
                refusals[index] = NotExtendable(f"the deadline of this order is {rfc3339(latest_us)} at the latest")
            elif request.pay_by_us > before_us:
                wanted[order.id] = request
        if wanted:
            deadlines = {order_id: request.pay_by_us for order_id, request in wanted.items()}
            await store.set_deadlines(tx, deadlines, await self._payments.extend(tx, deadlines), now_us)
            for order_id, pay_by_us in deadlines.items():
                await self._outbox.move(tx, deadline_key(order_id), due_us=pay_by_us)
        views = await store.read_views(tx, set(orders), None)
        return [refusals.get(index) or views[request.order_id] for index, request in enumerate(requests)]

    async def _end(self, tx: Tx, order_ids: set[int], to: OrderStatus, actor: str | Actors, traces: Traces) -> set[int]:
        """End unpaid orders together with their payment orders; one whose payment succeeded meanwhile stays open."""
        if not order_ids:
            return set()
        moved = await self._move(tx, await self._payments.end(tx, order_ids), to, actor)
        await self._outbox.add_all(tx, _told_closed(moved, to, traces))
        return set(moved)

    async def _move(self, tx: Tx, order_ids: set[int] | list[int], to: OrderStatus, actor: str | Actors) -> list[int]:
        moved = await self._moves.move(tx, order_ids, OrderStatus.PENDING_PAYMENT, to, actor)
        await self._outbox.cancel(tx, *(deadline_key(order_id) for order_id in moved))
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
