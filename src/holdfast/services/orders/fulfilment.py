"""The verbs after payment: ship, complete, and what a refund of all the money means for an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.retry import Retry
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import (
    Event,
    OrderArriving,
    OrderCompleted,
    OrderRefunded,
    OrderShipped,
    RefundOpened,
    RefundSucceeded,
)
from holdfast.services.orders import store
from holdfast.services.orders.model import (
    CompleteRequest,
    NotCompletable,
    NotShippable,
    OrderNotFound,
    OrderStatus,
    OrderView,
    ShipRequest,
)
from holdfast.services.orders.moves import Moves

REFUND = "refund"
UNPAID_AGAIN_MS = 200
ITSELF = "delivery time"  # the actor of a completion that nobody said


class Fulfilment:
    """Moves paid orders on; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock, outbox: Outbox, moves: Moves, complete_ms: int) -> None:
        self._clock = clock
        self._outbox = outbox
        self._moves = moves
        self._complete_us = complete_ms * US_PER_MS

    async def ship(self, tx: Tx, requests: Sequence[ShipRequest]) -> list[OrderView | HoldfastError]:
        """Note that paid orders have left the house; the same word again gives the same answer and does nothing.

        Answers `OrderNotFound`, or `NotShippable` for an order that is not paid or was shipped otherwise.
        """
        found = await store.lock_orders(tx, {request.order_id for request in requests})
        wanted: dict[int, ShipRequest] = {}
        for request in requests:
            if request.order_id in found and found[request.order_id].status == OrderStatus.PAID:
                wanted.setdefault(request.order_id, request)
        traces = {request.order_id: tx.trace_of(request) for request in wanted.values()}
        moved = await self._moves.move(
            tx,
            wanted,
            OrderStatus.PAID,
            OrderStatus.SHIPPED,
            {order_id: request.actor for order_id, request in wanted.items()},
            {order_id: request.tracking for order_id, request in wanted.items()},
        )
        complete_by_us = self._clock.now_us() + self._complete_us
        await store.mark_shipped(tx, {order_id: wanted[order_id].tracking for order_id in moved}, complete_by_us)
        drafts = [
            draft
            for order_id in moved
            for draft in (
                _fact(
                    topology.KEY_ORDER_SHIPPED,
                    OrderShipped(order_id=order_id, tracking=wanted[order_id].tracking),
                    traces[order_id],
                ),
                Draft(
                    exchange=topology.ORDER_EVENTS,
                    routing_key=topology.KEY_ORDER_ARRIVING,
                    body=OrderArriving(order_id=order_id),
                    due_us=complete_by_us,
                    cancel_key=arriving_key(order_id),
                    trace=traces[order_id],
                ),
            )
        ]
        await self._outbox.add_all(tx, drafts)
        views = await store.read_views(tx, set(found), None)
        answers: list[OrderView | HoldfastError] = []
        for request in requests:
            view = views.get(request.order_id)
            if view is None:
                answers.append(OrderNotFound())
            elif view.status is OrderStatus.SHIPPED and view.tracking == request.tracking:
                answers.append(view)
            else:
                answers.append(NotShippable(f"the order is {view.status}; only a paid one can be shipped, and once"))
        return answers

    async def complete(self, tx: Tx, requests: Sequence[CompleteRequest]) -> list[OrderView | HoldfastError]:
        """Complete shipped orders; again gives the same answer. Answers `OrderNotFound` or `NotCompletable`."""
        found = await store.lock_orders(tx, {request.order_id for request in requests})
        wanted: dict[int, CompleteRequest] = {}
        for request in requests:
            order = found.get(request.order_id)
            if order is not None and request.buyer in (None, order.buyer) and order.status == OrderStatus.SHIPPED:
                wanted.setdefault(request.order_id, request)
        traces = {request.order_id: tx.trace_of(request) for request in wanted.values()}
        await self._complete(tx, {order_id: request.actor for order_id, request in wanted.items()}, traces)
        views = await store.read_views(tx, set(found), None)
        answers: list[OrderView | HoldfastError] = []
        for request in requests:
            view = views.get(request.order_id)
            if view is None or request.buyer not in (None, found[request.order_id].buyer):
                answers.append(OrderNotFound())
            elif view.status is OrderStatus.COMPLETED:
                answers.append(view)
            else:
                answers.append(NotCompletable(f"the order is {view.status}; only a shipped one can be completed"))
        return answers

    async def arrive(self, tx: Tx, order_ids: Sequence[int]) -> list[bool | HoldfastError]:
        """Complete shipped orders whose delivery time is over; says for each whether nothing is left to wait for."""
        found = await store.lock_orders(tx, set(order_ids))
        now_us = self._clock.now_us()
        early = {
            order.id
            for order in found.values()
            if order.status == OrderStatus.SHIPPED and order.complete_by_us > now_us
        }
        due = {order.id for order in found.values() if order.status == OrderStatus.SHIPPED} - early
        await self._complete(tx, dict.fromkeys(due, ITSELF), {each: tx.trace_of(each) for each in order_ids})
        return [order_id not in early for order_id in order_ids]

    async def refunding(self, tx: Tx, events: Sequence[RefundOpened]) -> None:
        """Mark orders whose whole money is on its way back; what comes again or too late changes nothing.

        Raises `Retry`, as `refunded` does, while the word of the payment itself is still on its way.
        """
        full = {event.order_id for event in events if event.full}
        orders = await store.lock_orders(tx, full) if full else {}
        _refuse_unpaid(orders)
        await self._to_refunding(tx, orders)

    async def refunded(self, tx: Tx, events: Sequence[RefundSucceeded]) -> None:
        """Note what was given back of orders' money; those that got all of it back have ended.

        The sums in the events only grow, so it does not matter in which order they come, or how often.
        """
        given = {event.order_id: 0 for event in events}
        for event in events:
            given[event.order_id] = max(given[event.order_id], event.refunded_minor)
        orders = await store.lock_orders(tx, set(given))
        _refuse_unpaid(orders)
        await store.mark_refunded(tx, {order_id: given[order_id] for order_id in orders}, self._clock.now_us())
        whole = {event.order_id for event in events if event.refunded_minor >= event.captured_minor}
        ended = {order_id: order for order_id, order in orders.items() if order_id in whole}
        await self._to_refunding(tx, ended)
        moved = await self._moves.move(tx, ended, OrderStatus.REFUNDING, OrderStatus.REFUNDED, REFUND)
        traces = {event.order_id: tx.trace_of(event) for event in events}
        facts = [
            _fact(topology.KEY_ORDER_REFUNDED, OrderRefunded(order_id=order_id), traces[order_id]) for order_id in moved
        ]
        await self._outbox.add_all(tx, facts)

    async def _to_refunding(self, tx: Tx, orders: Mapping[int, Any]) -> None:
        moved: list[int] = []
        for came in (OrderStatus.PAID, OrderStatus.SHIPPED, OrderStatus.COMPLETED):
            chosen = {order_id for order_id, order in orders.items() if order.status == came}
            moved += await self._moves.move(tx, chosen, came, OrderStatus.REFUNDING, REFUND)
        await self._outbox.cancel(tx, *map(arriving_key, moved))

    async def _complete(self, tx: Tx, actors: Mapping[int, str], traces: Mapping[int, Mapping[str, str]]) -> None:
        moved = await self._moves.move(tx, actors, OrderStatus.SHIPPED, OrderStatus.COMPLETED, actors)
        await self._outbox.cancel(tx, *map(arriving_key, moved))
        await self._outbox.add_all(
            tx,
            [
                _fact(topology.KEY_ORDER_COMPLETED, OrderCompleted(order_id=order_id), traces.get(order_id, {}))
                for order_id in moved
            ],
        )


def _refuse_unpaid(orders: Mapping[int, Any]) -> None:
    """What became of the money of an order cannot be said before the order knows that it came."""
    if any(order.status == OrderStatus.PENDING_PAYMENT for order in orders.values()):
        raise Retry(UNPAID_AGAIN_MS, "the order does not know of its payment yet")


def arriving_key(order_id: int) -> str:
    """The cancel key of the message that completes a shipped order."""
    return f"order.arriving:{order_id}"


def _fact(key: str, body: Event, trace: Mapping[str, str]) -> Draft:
    """For whoever listens; nobody has to."""
    return Draft(exchange=topology.ORDER_EVENTS, routing_key=key, body=body, mandatory=False, trace=trace)
