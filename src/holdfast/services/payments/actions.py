"""Verbs of payments: open, apply a capture, end, refund. Each takes a batch within the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import msgspec
from sqlalchemy import update

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.prepared import insert
from holdfast.errors import HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import PaymentSucceeded, RefundDue, RefundRequested
from holdfast.services.contracts.values import Bill, PaymentRef
from holdfast.services.payments import store
from holdfast.services.payments.model import (
    PARKED,
    SUCCEEDED,
    UNDECIDED,
    WAITING,
    Capture,
    PaymentOrder,
    Verdict,
    judge,
)
from holdfast.services.payments.needs import Provider

log = observe.logger("payments")


class Payments:
    """What payments can do; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(
        self, clock: Clock, ids: IdSource, outbox: Outbox, providers: Mapping[str, Provider], chosen: str
    ) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox
        self._providers = providers
        self._chosen = providers[chosen]  # takes new payments; the others finish what they began

    async def open(self, tx: Tx, bills: Sequence[Bill]) -> list[PaymentRef]:
        """Open a payment order for each bill."""
        now_us = self._clock.now_us()
        opened = [
            PaymentOrder(
                id=self._ids.next(),
                order_id=bill.order_id,
                buyer=bill.buyer,
                provider=self._chosen.name,
                amount_minor=bill.amount_minor,
                currency=bill.currency,
                status=WAITING,
                trade_no=None,
                captured_minor=0,
                refunded_minor=0,
                captured_us=None,
                pay_by_us=bill.pay_by_us,
            )
            for bill in bills
        ]
        rows = [
            msgspec.structs.asdict(payment) | {"accepted_us": None, "created_us": now_us, "changed_us": now_us}
            for payment in opened
        ]
        await store.insert_payments.many(tx, rows)
        return [
            PaymentRef(id=str(payment.id), provider=payment.provider, pay_url=self._chosen.pay_url(payment))
            for payment in opened
        ]

    async def apply(self, tx: Tx, captures: Sequence[Capture]) -> list[Verdict | HoldfastError]:
        """Store verified notices and apply each capture once; answers what became of each.

        A capture for a payment order that had ended is applied all the same, since the money is there: orders then
        asks for its refund. A notice with wrong facts changes nothing but is kept, with an alarm; one whose payment
        order does not exist is kept so too, and applied by a later call if it appears.
        """
        payments = await store.lock_payments(tx, {capture.payment_id for capture in captures})
        told = await store.told_before(tx, {capture.event_id for capture in captures})
        before = dict(told)
        verdicts: list[Verdict | HoldfastError] = []
        applied: list[Capture] = []
        judged: dict[tuple[str, str], Capture] = {}
        for capture in captures:
            event = (capture.provider, capture.event_id)
            if event not in told or told[event] in UNDECIDED:
                payment = payments.get(capture.payment_id)
                verdict = judge(capture, payment, self._merchant_of(capture.provider))
                if verdict is Verdict.APPLIED and payment is not None:
                    payments[payment.id] = _captured(payment, capture)
                    applied.append(capture)
                told[event] = verdict
                judged.setdefault(event, capture)
            verdicts.append(told[event])
        await self._keep(tx, judged, before, told)
        if applied:
            await store.mark_succeeded(tx, applied, self._clock.now_us())
            await self._tell(tx, [(payments[capture.payment_id], tx.trace_of(capture)) for capture in applied])
        return verdicts

    async def keep(self, tx: Tx, captures: Sequence[Capture]) -> list[Verdict | HoldfastError]:
        """Keep notices that could not be judged, to be judged again."""
        for capture in captures:
            await store.keep_notice(tx, self._notice_row(capture, Verdict.RECEIVED))
            tx.on_commit(partial(_count, capture, Verdict.RECEIVED))
        return [Verdict.RECEIVED for _ in captures]

    async def tell_again(self, tx: Tx, payments: Sequence[PaymentOrder]) -> list[HoldfastError | None]:
        """Tell orders of payments that succeeded."""
        await self._tell(tx, [(payment, tx.trace_of(payment)) for payment in payments])
        return [None for _ in payments]

    async def end(self, tx: Tx, order_ids: Collection[int]) -> set[int]:
        """End unpaid payment orders; answers the orders that can close, not those paid meanwhile."""
        return await store.end_open(tx, order_ids, self._clock.now_us())

    async def accept(self, tx: Tx, payment_ids: Collection[int]) -> None:
        """Take note that these payments have paid their orders: they need not be told again."""
        if payment_ids:
            await store.accept(tx, payment_ids, self._clock.now_us())

    async def request_refunds(self, tx: Tx, wishes: Sequence[RefundRequested]) -> None:
        """Put refunds on the books, one for each payment and reason, and wake up the one who asks the provider."""
        payments = await store.lock_payments(tx, {wish.payment_id for wish in wishes})
        now_us = self._clock.now_us()
        await store.accept(tx, set(payments), now_us)
        drafts = []
        for wish in wishes:
            payment = payments[wish.payment_id]
            owed = payment.captured_minor - payment.refunded_minor
            if owed <= 0:
                continue
            refund_id = self._ids.next()
            row = {
                "id": refund_id,
                "payment_id": payment.id,
                "key": f"{wish.reason}:{payment.id}",
                "amount_minor": owed,
                "currency": payment.currency,
                "status": "pending",
                "created_us": now_us,
                "changed_us": now_us,
            }
            written = insert(tx.dialect, store.refunds).values(**row).on_conflict_do_nothing(index_elements=["key"])
            if (await tx.execute(written)).rowcount:
                drafts.append(_refund_due(refund_id, tx.trace_of(wish)))
        await self._outbox.add_all(tx, drafts)

    async def remind_refunds(self, tx: Tx, refund_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Wake up refunds whose message may have been lost."""
        await self._outbox.add_all(tx, [_refund_due(refund_id, {}) for refund_id in refund_ids])
        await store.touch_refunds(tx, refund_ids, self._clock.now_us())
        return [None for _ in refund_ids]

    async def mark_refunded(self, tx: Tx, refund_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Book refunds that the provider confirmed; each counts once."""
        now_us = self._clock.now_us()
        for payment_id, amount_minor in await store.finish_refunds(tx, refund_ids, now_us):
            booked = update(store.payments).where(store.payments.c.id == payment_id)
            more = store.payments.c.refunded_minor + amount_minor
            await tx.execute(booked.values(refunded_minor=more, changed_us=now_us))
        return [None for _ in refund_ids]

    def _merchant_of(self, provider: str) -> str | None:
        return self._providers[provider].merchant_id if provider in self._providers else None

    async def _tell(self, tx: Tx, payments: Sequence[tuple[PaymentOrder, Mapping[str, str]]]) -> None:
        drafts = [
            Draft(
                exchange=topology.PAY,
                routing_key=topology.KEY_PAY_SUCCESS,
                body=succeeded(payment),
                trace=trace,
            )
            for payment, trace in payments
        ]
        await self._outbox.add_all(tx, drafts)

    async def _keep(
        self,
        tx: Tx,
        judged: Mapping[tuple[str, str], Capture],
        before: Mapping[tuple[str, str], Verdict],
        now: Mapping[tuple[str, str], Verdict],
    ) -> None:
        new = [self._notice_row(capture, now[event]) for event, capture in judged.items() if event not in before]
        await store.insert_notices.many(tx, new)
        changed = {event: now[event] for event in judged if event in before and before[event] != now[event]}
        await store.judge_again(tx, changed)
        for event, capture in judged.items():
            if before.get(event) != now[event]:
                tx.on_commit(partial(_count, capture, now[event]))

    def _notice_row(self, capture: Capture, verdict: Verdict) -> dict[str, object]:
        now_us = self._clock.now_us()
        return msgspec.structs.asdict(capture) | {"verdict": verdict.value, "received_us": now_us}


def succeeded(payment: PaymentOrder) -> PaymentSucceeded:
    """What orders is told of a payment order whose money was captured."""
    assert payment.captured_us is not None
    return PaymentSucceeded(
        payment_id=payment.id,
        order_id=payment.order_id,
        amount_minor=payment.amount_minor,
        currency=payment.currency,
        captured_us=payment.captured_us,
    )


def _count(capture: Capture, verdict: Verdict) -> None:
    observe.payment_notices.labels(capture.provider, verdict.value).inc()
    if verdict in PARKED:
        log.error(
            "notice_parked",
            provider=capture.provider,
            event_id=capture.event_id,
            payment_id=capture.payment_id,
            verdict=verdict.value,
        )


def _captured(payment: PaymentOrder, capture: Capture) -> PaymentOrder:
    return msgspec.structs.replace(
        payment,
        status=SUCCEEDED,
        trade_no=capture.trade_no,
        captured_minor=payment.amount_minor,
        captured_us=capture.captured_us,
    )


def _refund_due(refund_id: int, trace: Mapping[str, str]) -> Draft:
    due = RefundDue(refund_id=refund_id)
    return Draft(exchange=topology.PAY, routing_key=topology.KEY_PAY_REFUND, body=due, trace=trace)
