"""The verb *place*: a batch of wishes becomes orders, with stock held, payments opened and messages written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderCreated, OrderDue
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.contracts.values import Bill, PaymentRef, Wanted
from holdfast.services.orders import store
from holdfast.services.orders.model import (
    OrderStatus,
    Placed,
    PlaceRequest,
    PricedLine,
    SoldOut,
    check_lines,
    price_lines,
    unpriced,
    view,
)
from holdfast.services.orders.needs import Catalogue, Payments, Stock
from holdfast.settings import OrdersSettings

Answer = Placed | HoldfastError


class _Draft(msgspec.Struct, kw_only=True):
    """An order in the making."""

    order_id: int
    request: PlaceRequest
    lines: tuple[PricedLine, ...]
    amount_minor: int
    currency: str


class PlaceOrders:
    """Places orders; one instance is shared by all callers, since group commit tells verbs apart by their identity."""

    def __init__(
        self,
        clock: Clock,
        ids: IdSource,
        outbox: Outbox,
        settings: OrdersSettings,
        *,
        catalogue: Catalogue,
        stock: Stock,
        payments: Payments,
    ) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox
        self._settings = settings
        self._catalogue = catalogue
        self._stock = stock
        self._payments = payments

    async def __call__(self, tx: Tx, requests: Sequence[PlaceRequest]) -> list[Answer]:
        """Decide wishes in order of arrival; a refused one changes nothing and leaves its idempotency key unused.

        A key that was used before, earlier or in this very batch, gives the stored answer again if the lines are the
        same, `KeyReused` if not. Two processes that place the same new key at once meet at its unique row: the later
        one loses with `Conflict`, which group commit decides again and then finds the stored answer.
        """
        answers = _replays(await store.stored_replies(tx, requests), requests)
        while len(answers) < len(requests):
            first: dict[tuple[str, str], int] = {}
            for index, request in enumerate(requests):
                if index not in answers:
                    first.setdefault((request.buyer, request.idempotency_key), index)
            fresh = sorted(first.values())
            placed = await self._place_fresh(tx, [requests[index] for index in fresh])
            answers.update(zip(fresh, placed, strict=True))
            for index, request in enumerate(requests):
                if index not in answers:
                    original = first[request.buyer, request.idempotency_key]
                    answer = _repeated(requests[original], answers[original], request)
                    if answer is not None:
                        answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    async def _place_fresh(self, tx: Tx, requests: Sequence[PlaceRequest]) -> list[Answer]:
        drafts = await self._price(tx, requests)
        wanted = [draft for draft in drafts if isinstance(draft, _Draft)]
        orders = [Wanted(order_id=draft.order_id, lines=unpriced(draft.request.lines)) for draft in wanted]
        for order, cause in zip(orders, wanted, strict=True):
            tx.caused(order, tx.trace_of(cause.request))
        shortages = iter(await self._stock.reserve(tx, orders) if orders else ())
        held: list[_Draft] = []
        answers: list[Answer | None] = []
        for draft in drafts:
            if not isinstance(draft, _Draft):
                answers.append(draft)
            elif isinstance(short := next(shortages), HoldfastError):
                answers.append(short)
            elif short is not None:
                answers.append(SoldOut(f"of SKU {short.sku!r} {short.available} are left, {short.wanted} were wanted"))
            else:
                held.append(draft)
                answers.append(None)
        placed = iter(await self._write(tx, held) if held else ())
        decided = [next(placed) if answer is None else answer for answer in answers]
        return await self._placed_meanwhile(tx, requests, decided)

    async def _placed_meanwhile(self, tx: Tx, requests: Sequence[PlaceRequest], decided: list[Answer]) -> list[Answer]:
        """A wish that is sold out here may be one that another process placed while we waited for the stock."""
        refused = [index for index, answer in enumerate(decided) if isinstance(answer, SoldOut)]
        if refused:
            again = [requests[index] for index in refused]
            for at, answer in _replays(await store.stored_replies(tx, again), again).items():
                decided[refused[at]] = answer
        return decided

    async def _price(self, tx: Tx, requests: Sequence[PlaceRequest]) -> list[_Draft | HoldfastError]:
        skus = {line.sku for request in requests for line in request.lines}
        prices = await self._catalogue.prices(tx, skus) if skus else {}
        drafts: list[_Draft | HoldfastError] = []
        for request in requests:
            try:
                check_lines(request.lines, self._settings.lines_max, self._settings.quantity_max)
            except InvalidInput as error:
                drafts.append(error)
                continue
            priced = price_lines(request.lines, prices)
            if isinstance(priced, HoldfastError):
                drafts.append(priced)
                continue
            lines, amount_minor, currency = priced
            drafts.append(
                _Draft(
                    order_id=self._ids.next(),
                    request=request,
                    lines=lines,
                    amount_minor=amount_minor,
                    currency=currency,
                )
            )
        return drafts

    async def _write(self, tx: Tx, drafts: Sequence[_Draft]) -> list[Placed]:
        now_us = self._clock.now_us()
        pay_by_us = now_us + self._settings.time_out_ms * US_PER_MS
        bills = [
            Bill(
                order_id=draft.order_id,
                buyer=draft.request.buyer,
                amount_minor=draft.amount_minor,
                currency=draft.currency,
                pay_by_us=pay_by_us,
            )
            for draft in drafts
        ]
        payments = await self._payments.open(tx, bills)
        await self._write_rows(tx, drafts, payments, now_us, pay_by_us)
        placed = [_placed(draft, payment, now_us, pay_by_us) for draft, payment in zip(drafts, payments, strict=True)]
        replies = [
            {
                "key": draft.request.idempotency_key,
                "buyer": draft.request.buyer,
                "fingerprint": draft.request.fingerprint,
                "order_id": draft.order_id,
                "body": answer.body,
                "created_us": now_us,
            }
            for draft, answer in zip(drafts, placed, strict=True)
        ]
        await store.insert_replies.many(tx, replies)
        await self._outbox.add_all(
            tx, [message for draft in drafts for message in _messages(draft, pay_by_us, tx.trace_of(draft.request))]
        )
        tx.on_commit(lambda: observe.orders_moved.labels(OrderStatus.PENDING_PAYMENT.value).inc(len(drafts)))
        return placed

    async def _write_rows(
        self, tx: Tx, drafts: Sequence[_Draft], payments: Sequence[PaymentRef], now_us: int, pay_by_us: int
    ) -> None:
        orders = [
            {
                "id": draft.order_id,
                "buyer": draft.request.buyer,
                "status": OrderStatus.PENDING_PAYMENT.value,
                "amount_minor": draft.amount_minor,
                "currency": draft.currency,
                "payment": msgspec.json.encode(payment).decode(),
                "pay_by_us": pay_by_us,
                "created_us": now_us,
                "changed_us": now_us,
            }
            for draft, payment in zip(drafts, payments, strict=True)
        ]
        lines = [
            {
                "order_id": draft.order_id,
                "line_no": number,
                "sku": line.sku,
                "quantity": line.quantity,
                "price_minor": line.price_minor,
            }
            for draft in drafts
            for number, line in enumerate(draft.lines, start=1)
        ]
        entries = [
            {
                "id": self._ids.next(),
                "order_id": draft.order_id,
                "from_status": None,
                "to_status": OrderStatus.PENDING_PAYMENT.value,
                "actor": draft.request.buyer,
                "at_us": now_us,
            }
            for draft in drafts
        ]
        await store.insert_orders.many(tx, orders)
        await store.insert_lines.many(tx, lines)
        await store.insert_entries.many(tx, entries)


def deadline_key(order_id: int) -> str:
    """The cancel key of an order's time-out message."""
    return f"order.due:{order_id}"


def _replays(stored: Mapping[tuple[str, str], Any], requests: Sequence[PlaceRequest]) -> dict[int, Answer]:
    """The answers to requests whose key has a stored one, by index."""
    answers = {}
    for index, request in enumerate(requests):
        row = stored.get((request.buyer, request.idempotency_key))
        if row is not None:
            answers[index] = _replay(row.fingerprint, row.order_id, row.body, request)
    return answers


def _replay(fingerprint: bytes, order_id: int, body: bytes, request: PlaceRequest) -> Answer:
    if fingerprint != request.fingerprint:
        return KeyReused()
    return Placed(order_id=order_id, body=body, replayed=True)


def _repeated(first: PlaceRequest, answer: Answer, request: PlaceRequest) -> Answer | None:
    """The answer to a request whose key came earlier in the batch; None when that one left the key unused."""
    if isinstance(answer, Placed):
        return _replay(first.fingerprint, answer.order_id, answer.body, request)
    return copy.copy(answer) if first.fingerprint == request.fingerprint else None


def _placed(draft: _Draft, payment: PaymentRef, created_us: int, pay_by_us: int) -> Placed:
    seen = view(
        draft.order_id,
        OrderStatus.PENDING_PAYMENT,
        draft.lines,
        draft.amount_minor,
        draft.currency,
        created_us,
        pay_by_us,
        payment,
    )
    return Placed(order_id=draft.order_id, body=msgspec.json.encode(seen), replayed=False)


def _messages(draft: _Draft, pay_by_us: int, trace: Mapping[str, str]) -> list[Draft]:
    created = OrderCreated(
        order_id=draft.order_id,
        buyer=draft.request.buyer,
        amount_minor=draft.amount_minor,
        currency=draft.currency,
        lines=unpriced(draft.request.lines),
        pay_by_us=pay_by_us,
    )
    return [
        Draft(
            exchange=topology.ORDER_EVENTS,
            routing_key=topology.KEY_ORDER_CREATE,
            body=created,
            mandatory=False,  # a fact for whoever listens; nobody has to
            trace=trace,
        ),
        Draft(
            exchange=topology.ORDER_EVENTS,
            routing_key=topology.KEY_ORDER_DUE,
            body=OrderDue(order_id=draft.order_id),
            due_us=pay_by_us,
            cancel_key=deadline_key(draft.order_id),
            trace=trace,
        ),
    ]
