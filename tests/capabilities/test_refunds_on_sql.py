"""Rows H19 and H42 of the capability table: a refund is not overwritten, and happens once.

H19 with the toolkit alone: inbox, and one guarded UPDATE for each step of an order. H42 in the shop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import Column, MetaData, Table, Text, insert, select, update

from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.messaging.listen import Effect, Listen
from holdfast.services.payments.model import NothingToRefund, RefundStatus, RefundWish, as_booked
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.contract.notes import EXCHANGE, KEY, ONCE, QUEUE, Memo, Note, counts_become, office, parked_messages
from tests.shop import PRICE_MINOR, clean, count, level_becomes, one_by_one, order, pay, rows, stock_up, two_systems

_metadata = MetaData()
_orders = Table("test_order", _metadata, Column("number", Text, primary_key=True), Column("status", Text))


class Desk:
    """Pays orders on a `Note` and refunds them on a `Memo`; each message names its order."""

    def __init__(self, system: System) -> None:
        self.handled: list[str] = []
        self.changed: list[str] = []
        self._system = system

    async def open(self, *numbers: str) -> None:
        """Take unpaid orders in, and listen."""
        async with self._system.database.transaction() as tx:
            await tx.connection.run_sync(_metadata.create_all)
            await tx.execute(insert(_orders), [{"number": number, "status": "unpaid"} for number in numbers])
        effects: dict[type, Effect] = {Note: self._paid, Memo: self._refunded}
        self._system.listen(Listen(name="orders", queue=QUEUE, effects=effects, local=ONCE, durable=ONCE))

    async def tell(self, body: Note | Memo, message_id: str) -> None:
        """Send a message and wait until it is handled."""
        await self._system.publisher.publish(EXCHANGE, KEY, body, message_id=message_id)
        await counts_become(self._system, (0, 0, 0))

    async def statuses(self) -> dict[str, str]:
        async with self._system.database.read() as tx:
            return {row.number: row.status for row in await tx.execute(select(_orders))}

    async def _paid(self, tx: Tx, notes: Sequence[Note]) -> None:
        for each in notes:
            await self._move(tx, each.text, "unpaid", "paid")

    async def _refunded(self, tx: Tx, memos: Sequence[Memo]) -> None:
        for each in memos:
            await self._move(tx, each.text, "paid", "refunded")

    async def _move(self, tx: Tx, number: str, before: str, after: str) -> None:
        guarded = update(_orders).where(_orders.c.number == number, _orders.c.status == before)
        moved = (await tx.execute(guarded.values(status=after))).rowcount
        self.handled.append(f"{number} {after}")
        self.changed += [f"{number} {after}"] * moved


@pytest.mark.parametrize("copies", [("pay-1", "pay-2"), ("pay-2", "pay-1")])
async def test_H19_refund_not_overwritten(start_system: StartSystem, copies: tuple[str, str]) -> None:  # noqa: N802
    """paid, refunded, then paid again: as a copy under the same message id, and as another message; either first."""
    system = await office(start_system)
    desk = Desk(system)
    await desk.open("A", "B")
    await desk.tell(Note("A"), "pay-1")
    assert await desk.statuses() == {"A": "paid", "B": "unpaid"}
    await desk.tell(Memo("A"), "refund-1")
    assert await desk.statuses() == {"A": "refunded", "B": "unpaid"}

    for message_id in copies:
        await desk.tell(Note("A"), message_id)
        assert await desk.statuses() == {"A": "refunded", "B": "unpaid"}

    assert desk.handled == ["A paid", "A refunded", "A paid"]  # the inbox dropped the copy with the same id
    assert desk.changed == ["A paid", "A refunded"]  # the guard of the UPDATE stopped the other
    await desk.tell(Note("B"), "pay-of-B")
    assert await desk.statuses() == {"A": "refunded", "B": "paid"}  # the handler still pays what is unpaid
    assert await parked_messages(system) == []


@pytest.mark.parametrize("one_key", [True, False], ids=["one key", "twenty keys"])
async def test_H42_refund_idempotency(start_system: StartSystem, settings: Settings, one_key: bool) -> None:  # noqa: N802
    """20 refund calls at once, with one key or each with its own for all that is left: the provider sees one refund."""
    systems = await two_systems(start_system, one_by_one(settings))
    system = systems[0]
    await stock_up(system, "SKU-1", 5)
    view = await order(system, quantity=3)
    await pay(system, view)
    await level_becomes(system, sold=3)

    def asked(number: int) -> RefundWish:
        key = "one" if one_key else f"key-{number}"
        return RefundWish(key=key, actor="boss", reason="the show is off", payment_id=int(view.payment.id))

    answers = await asyncio.gather(
        *(systems[number % len(systems)].refunds.request(asked(number)) for number in range(20)),
        return_exceptions=True,
    )

    booked = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len({each.refund.id for each in booked}) == 1
    assert len({as_booked(each.refund) for each in booked}) == 1
    assert [each.replayed for each in booked].count(False) == 1
    assert len(booked) == (20 if one_key else 1)
    assert all(isinstance(answer, NothingToRefund) for answer in answers if isinstance(answer, BaseException))

    async def done() -> bool:
        return (await system.refunds.get(booked[0].refund.id)).status is RefundStatus.DONE

    await eventually(done, "the provider gave the money back")
    assert await rows(system, "SELECT amount_minor FROM sandbox_refund") == [{"amount_minor": 3 * PRICE_MINOR}]
    assert await count(system, "SELECT id FROM payment_refund") == 1
    assert await rows(system, "SELECT captured_minor, refunded_minor, refunding_minor FROM payment_order") == [
        {"captured_minor": 3 * PRICE_MINOR, "refunded_minor": 3 * PRICE_MINOR, "refunding_minor": 0}
    ]
    await clean(system)
