"""Verbs of refunds: put on the books, ask again, finish, refuse. Each takes a batch within the caller's transaction.

    (asked for) --> pending --provider did it-------> done
                      ^  |----nobody knows----------> pending, asked again later
                      |  '----provider refused------> refused, its amount is free again
                      '-------------retry-----------------'

Payments are locked first, in order of id, then refunds move; so two writers never wait for each other in a ring.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import RefundDue, RefundOpened, RefundRequested, RefundSucceeded
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.payments import refund_store, store
from holdfast.services.payments.model import (
    LATE,
    STAFF,
    PaymentNotFound,
    PaymentOrder,
    Refund,
    RefundDone,
    RefundNotFound,
    RefundTooLarge,
    RefundWish,
    ask_again_ms,
    refund_amount,
)
from holdfast.services.payments.refund_store import DONE, PENDING, REFUSED

SYSTEM = "system"

log = observe.logger("refunds")


class Booked(msgspec.Struct, frozen=True, kw_only=True):
    """A refund that stands on the books; `replayed` when it did so before."""

    refund: Refund
    replayed: bool


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The provider's word that a refund has not happened and will not."""

    refund_id: int
    reason: str


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """Staff's wish that the provider is asked for a refund once more."""

    refund_id: int
    actor: str


class Refunds:
    """What can be done about refunds; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock, ids: IdSource, outbox: Outbox) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox

    async def request(self, tx: Tx, wishes: Sequence[RefundWish]) -> list[Booked | HoldfastError]:
        """Put refunds of staff on the books in order of arrival, reserve their amounts and tell of each.

        A key that was used before gives the same refund again if the wish is the same, `KeyReused` if not. Refuses
        `PaymentNotFound`, `NothingToRefund` and `RefundTooLarge`, which leave the key unused.
        """
        orders = {wish.order_id for wish in wishes if wish.order_id is not None}
        of_orders = await refund_store.payments_of_orders(tx, orders) if orders else {}
        wanted = [wish.payment_id if wish.order_id is None else of_orders.get(wish.order_id) for wish in wishes]
        payments = await store.lock_payments(tx, {payment_id for payment_id in wanted if payment_id is not None})
        # Read behind the locks: of two processes with one new key, the second finds what the first has booked.
        known = await refund_store.by_keys(tx, {_staff_key(wish) for wish in wishes})
        answers: list[Booked | HoldfastError] = []
        opened: list[Refund] = []
        drafts: list[Draft] = []
        for wish, payment_id in zip(wishes, wanted, strict=True):
            key = _staff_key(wish)
            if key in known:
                same = known[key].fingerprint == wish.fingerprint
                answers.append(Booked(refund=known[key], replayed=True) if same else KeyReused())
                continue
            payment = payments.get(payment_id) if payment_id is not None else None
            if payment is None:
                answers.append(PaymentNotFound())
                continue
            amount_minor = refund_amount(wish, payment)
            if isinstance(amount_minor, HoldfastError):
                answers.append(amount_minor)
                continue
            refund = self._new(payment, key, STAFF, wish.reason, wish.actor, wish.fingerprint, amount_minor)
            known[key] = refund
            payments[payment.id] = payment = _reserved(payment, amount_minor)
            opened.append(refund)
            drafts += [_due(refund.id, tx.trace_of(wish)), _opened(refund, payment, tx.trace_of(wish))]
            answers.append(Booked(refund=refund, replayed=False))
        await self._open(tx, opened, drafts)
        return answers

    async def request_late(self, tx: Tx, wishes: Sequence[RefundRequested]) -> None:
        """Put the refunds of money that no order owes on the books, all that is left, once for each payment."""
        payments = await store.lock_payments(tx, {wish.payment_id for wish in wishes})
        await store.accept(tx, set(payments), self._clock.now_us())
        known = await refund_store.by_keys(tx, {_late_key(wish) for wish in wishes})
        opened: list[Refund] = []
        drafts: list[Draft] = []
        for wish in wishes:
            payment = payments[wish.payment_id]
            key = _late_key(wish)
            if key in known or payment.left_minor <= 0:
                continue
            refund = self._new(payment, key, LATE, wish.reason, SYSTEM, b"", payment.left_minor)
            known[key] = refund
            payments[payment.id] = _reserved(payment, refund.amount_minor)
            opened.append(refund)
            drafts.append(_due(refund.id, tx.trace_of(wish)))
        await self._open(tx, opened, drafts)

    async def give_back(self, tx: Tx, payment_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Give back what is kept for ended orders: a late refund is opened, or one that was refused is asked again."""
        payments = await store.lock_payments(tx, payment_ids)
        wishes = [
            RefundRequested(payment_id=payment.id, order_id=payment.order_id, reason=LATE)
            for payment in payments.values()
        ]
        known = await refund_store.by_keys(tx, {_late_key(wish) for wish in wishes})
        refused = [Again(refund_id=refund.id, actor=SYSTEM) for refund in known.values() if refund.status == REFUSED]
        answers = dict(zip((again.refund_id for again in refused), await self.retry(tx, refused), strict=True))
        await self.request_late(tx, wishes)
        of_payment = {refund.payment_id: answers.get(refund.id) for refund in known.values()}
        return [
            of_payment.get(payment_id) if payment_id in payments else PaymentNotFound() for payment_id in payment_ids
        ]

    async def remind(self, tx: Tx, refund_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Wake up refunds whose message may have been lost."""
        pending = await refund_store.touch(tx, refund_ids, self._clock.now_us())
        await self._wake(tx, [_due(refund_id, {}) for refund_id in pending])
        return [None for _ in refund_ids]

    async def postpone(self, tx: Tx, refund_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Ask again later, since the provider's answer is unknown: after 5 s, then twice as long each time."""
        known = await refund_store.by_ids(tx, set(refund_ids))
        now_us = self._clock.now_us()
        pending = [refund for refund in known.values() if refund.status == PENDING]
        waits = {refund.id: ask_again_ms(refund.attempts + 1) for refund in pending}
        await refund_store.postpone(
            tx, [(refund_id, now_us + wait_ms * US_PER_MS) for refund_id, wait_ms in waits.items()]
        )
        await self._wake(tx, [_due(refund_id, {}, delay_ms=wait_ms) for refund_id, wait_ms in waits.items()])
        return [None for _ in refund_ids]

    async def finish(self, tx: Tx, refund_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Book refunds that the provider confirmed, each once, and tell of them."""
        payments = await self._lock_payments_of(tx, refund_ids)
        done = await self._move(tx, refund_ids, PENDING, DONE, SYSTEM, "")
        shifts: dict[int, tuple[int, int]] = {}
        drafts = []
        for refund in done:
            before = shifts.get(refund.payment_id, (0, 0))
            after = shifts[refund.payment_id] = (before[0] + refund.amount_minor, before[1] - refund.amount_minor)
            drafts.append(_succeeded(refund, payments[refund.payment_id], after[0]))
        await refund_store.shift(tx, shifts, self._clock.now_us())
        await self._outbox.add_all(tx, drafts)
        return [None for _ in refund_ids]

    async def refuse(self, tx: Tx, refusals: Sequence[Refusal]) -> list[HoldfastError | None]:
        """Book that the provider refused refunds: their amounts are free again, and a human is told by an alarm."""
        await self._lock_payments_of(tx, [refusal.refund_id for refusal in refusals])
        for refusal in refusals:
            moved = await self._move(tx, [refusal.refund_id], PENDING, REFUSED, SYSTEM, refusal.reason[:500])
            for refund in moved:
                await refund_store.shift(tx, {refund.payment_id: (0, -refund.amount_minor)}, self._clock.now_us())
                tx.on_commit(_alarm(refund))
        return [None for _ in refusals]

    async def retry(self, tx: Tx, wishes: Sequence[Again]) -> list[HoldfastError | None]:
        """Have the provider asked once more: now for a pending refund, with its amount reserved anew for a refused one.

        Refuses `RefundNotFound`, `RefundDone`, and `RefundTooLarge` when the amount was given back otherwise meanwhile.
        """
        payments = await self._lock_payments_of(tx, [wish.refund_id for wish in wishes])
        known = await refund_store.by_ids(tx, {wish.refund_id for wish in wishes})
        return [await self._retry_one(tx, wish, known, payments) for wish in wishes]

    async def _retry_one(
        self, tx: Tx, wish: Again, known: dict[int, Refund], payments: dict[int, PaymentOrder]
    ) -> HoldfastError | None:
        refund = known.get(wish.refund_id)
        if refund is None:
            return RefundNotFound()
        if refund.status == DONE:
            return RefundDone()
        if refund.status == REFUSED:
            payment = payments[refund.payment_id]
            if refund.amount_minor > payment.left_minor:
                return RefundTooLarge(f"{payment.left_minor} can be given back, this refund is {refund.amount_minor}")
            (known[refund.id],) = await self._move(tx, [refund.id], REFUSED, PENDING, wish.actor, "")
            await refund_store.shift(tx, {payment.id: (0, refund.amount_minor)}, self._clock.now_us())
            payments[payment.id] = _reserved(payment, refund.amount_minor)
        await self.remind(tx, [refund.id])
        return None

    async def _open(self, tx: Tx, opened: Sequence[Refund], drafts: Sequence[Draft]) -> None:
        await refund_store.insert_refunds.many(tx, [msgspec.structs.asdict(refund) for refund in opened])
        shifts: dict[int, tuple[int, int]] = {}
        for refund in opened:
            shifts[refund.payment_id] = (0, shifts.get(refund.payment_id, (0, 0))[1] + refund.amount_minor)
        await refund_store.shift(tx, shifts, self._clock.now_us())
        await self._note(tx, opened, None, PENDING, None, None)
        await self._outbox.add_all(tx, drafts)

    async def _wake(self, tx: Tx, drafts: Sequence[Draft]) -> None:
        """At most one message of a refund waits, however often somebody is asked to see to it."""
        await self._outbox.cancel(tx, *(draft.cancel_key for draft in drafts if draft.cancel_key))
        await self._outbox.add_all(tx, drafts)

    async def _lock_payments_of(self, tx: Tx, refund_ids: Collection[int]) -> dict[int, PaymentOrder]:
        known = await refund_store.by_ids(tx, set(refund_ids))
        return await store.lock_payments(tx, {refund.payment_id for refund in known.values()})

    async def _move(
        self, tx: Tx, refund_ids: Collection[int], came: str, to: str, actor: str, detail: str
    ) -> list[Refund]:
        moved = await refund_store.move(tx, set(refund_ids), came, to, detail, self._clock.now_us())
        await self._note(tx, moved, came, to, actor, detail)
        return moved

    async def _note(
        self, tx: Tx, moved: Sequence[Refund], came: str | None, to: str, actor: str | None, detail: str | None
    ) -> None:
        """A row for each step; the first one names who asked for the refund, and why."""
        rows = [
            {
                "id": self._ids.next(),
                "refund_id": refund.id,
                "from_status": came,
                "to_status": to,
                "actor": refund.actor if actor is None else actor,
                "detail": refund.reason if detail is None else detail,
                "at_us": self._clock.now_us(),
            }
            for refund in moved
        ]
        await refund_store.insert_steps.many(tx, rows)

    def _new(
        self,
        payment: PaymentOrder,
        key: str,
        kind: str,
        reason: str,
        actor: str,
        fingerprint: bytes,
        amount_minor: int,
    ) -> Refund:
        now_us = self._clock.now_us()
        return Refund(
            id=self._ids.next(),
            payment_id=payment.id,
            order_id=payment.order_id,
            key=key,
            kind=kind,
            reason=reason,
            actor=actor,
            fingerprint=fingerprint,
            amount_minor=amount_minor,
            currency=payment.currency,
            status=PENDING,
            attempts=0,
            ask_us=now_us,
            detail="",
            created_us=now_us,
            changed_us=now_us,
        )


def _staff_key(wish: RefundWish) -> str:
    return f"{STAFF}:{wish.key}"


def _late_key(wish: RefundRequested) -> str:
    return f"{wish.reason}:{wish.payment_id}"


def _reserved(payment: PaymentOrder, amount_minor: int) -> PaymentOrder:
    return msgspec.structs.replace(payment, refunding_minor=payment.refunding_minor + amount_minor)


def _alarm(refund: Refund) -> Any:
    return lambda: log.error(
        "refund_refused",
        refund_id=refund.id,
        payment_id=refund.payment_id,
        amount_minor=refund.amount_minor,
        currency=refund.currency,
        reason=refund.detail,
    )


def _due(refund_id: int, trace: Mapping[str, str], *, delay_ms: int = 0) -> Draft:
    return Draft(
        exchange=topology.PAY,
        routing_key=topology.KEY_PAY_REFUND,
        body=RefundDue(refund_id=refund_id),
        delay_ms=delay_ms,
        cancel_key=f"refund:{refund_id}",
        trace=trace,
    )


def _opened(refund: Refund, payment: PaymentOrder, trace: Mapping[str, str]) -> Draft:
    body = RefundOpened(
        refund_id=refund.id,
        payment_id=refund.payment_id,
        order_id=refund.order_id,
        amount_minor=refund.amount_minor,
        full=payment.left_minor == 0,
    )
    # A fact for whoever listens; nobody has to.
    return Draft(exchange=topology.PAY, routing_key=topology.KEY_REFUND_OPENED, body=body, trace=trace, mandatory=False)


def _succeeded(refund: Refund, payment: PaymentOrder, more_minor: int) -> Draft:
    body = RefundSucceeded(
        refund_id=refund.id,
        payment_id=refund.payment_id,
        order_id=refund.order_id,
        amount_minor=refund.amount_minor,
        currency=refund.currency,
        refunded_minor=payment.refunded_minor + more_minor,
        captured_minor=payment.captured_minor,
        key_reason=refund.kind,
    )
    return Draft(exchange=topology.PAY, routing_key=topology.KEY_REFUNDED, body=body, mandatory=False)
