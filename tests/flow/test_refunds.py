"""Refunds by staff: never above what was captured, once per key, and whatever the provider answers is booked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast.bootstrap import System
from holdfast.clock import ManualClock
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import RefundOpened, RefundSucceeded
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.orders.model import OrderView
from holdfast.services.payments.model import (
    ASK_AGAIN_MS,
    ASK_AGAIN_MS_MAX,
    NothingToRefund,
    PaymentNotFound,
    PaymentOrder,
    RefundDone,
    RefundNotFound,
    RefundStatus,
    RefundTooLarge,
    RefundWish,
    ask_again_ms,
)
from holdfast.services.payments.needs import RefundAnswer, RefundEnd
from holdfast.services.payments.refunds import Booked
from tests.conftest import StartSystem, eventually
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    clean_in_time,
    count,
    deliver,
    in_time,
    level_becomes,
    lose,
    order,
    pay,
    probe,
    rows,
    signed_notice,
    stock_up,
    waiting,
)


class Teller:
    """A shop with one paid order of five units, and a provider whose answers to refunds can be told beforehand."""

    def __init__(self, system: System, clock: ManualClock, view: OrderView, patch: pytest.MonkeyPatch) -> None:
        self.system = system
        self.clock = clock
        self.view = view
        self.asked: list[int] = []
        self.answers: list[RefundAnswer] = []
        refund = system.sandbox.refund

        async def told(payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
            self.asked.append(refund_id)
            return self.answers.pop(0) if self.answers else await refund(payment, refund_id, amount_minor)

        patch.setattr(system.sandbox, "refund", told)

    async def ask(self, key: str = "key-1", amount_minor: int | None = None, **changed: Any) -> Booked:
        facts: dict[str, Any] = {"payment_id": int(self.view.payment.id), "reason": "a scratch"} | changed
        return await self.system.refunds.request(RefundWish(key=key, actor="boss", amount_minor=amount_minor, **facts))

    async def becomes(self, booked: Booked, status: RefundStatus) -> None:
        async def reached() -> bool:
            return (await self.system.refunds.get(booked.refund.id)).status is status

        await in_time(self.clock, reached, f"the refund is {status}", within_s=3_600, step_s=0.25)

    async def money(self) -> tuple[int, int, int]:
        """(captured, refunded, reserved), in units of the price."""
        (row,) = await rows(
            self.system,
            "SELECT captured_minor, refunded_minor, refunding_minor FROM payment_order WHERE order_id = :order_id",
            order_id=int(self.view.id),
        )
        captured, refunded, refunding = row.values()
        return captured // PRICE_MINOR, refunded // PRICE_MINOR, refunding // PRICE_MINOR


@pytest.fixture
async def teller(start_system: StartSystem, monkeypatch: pytest.MonkeyPatch) -> Teller:
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 10)
    view = await order(system, quantity=5)
    await pay(system, view)
    await level_becomes(system, sold=5)
    return Teller(system, clock, view, monkeypatch)


async def test_parts_are_given_back_until_nothing_is_left(teller: Teller) -> None:
    first = await teller.ask("first", 2 * PRICE_MINOR)
    assert await teller.money() == (5, 0, 2)
    with pytest.raises(RefundTooLarge, match="3000 can be given back, 4000"):
        await teller.ask("too much", 4 * PRICE_MINOR)
    rest = await teller.ask("rest")
    assert rest.refund.amount_minor == 3 * PRICE_MINOR
    with pytest.raises(NothingToRefund):
        await teller.ask("more", 1)
    await teller.becomes(first, RefundStatus.DONE)
    await teller.becomes(rest, RefundStatus.DONE)
    assert await teller.money() == (5, 5, 0)
    with pytest.raises(NothingToRefund):
        await teller.ask("more")
    assert await count(teller.system, "SELECT refund_id FROM sandbox_refund") == 2
    await clean_in_time(teller.system, teller.clock)


async def test_a_key_stands_for_one_wish(teller: Teller) -> None:
    booked = await teller.ask("key", PRICE_MINOR)
    again = await teller.ask("key", PRICE_MINOR)
    assert (again.refund.id, booked.replayed, again.replayed) == (booked.refund.id, False, True)
    for changed in ({"amount_minor": 2 * PRICE_MINOR}, {"reason": "another"}, {"payment_id": 1}):
        with pytest.raises(KeyReused):
            await teller.ask("key", **{"amount_minor": PRICE_MINOR} | changed)
    with pytest.raises(KeyReused):
        await teller.ask("key", PRICE_MINOR, payment_id=None, order_id=int(teller.view.id))
    await teller.becomes(booked, RefundStatus.DONE)
    assert (await teller.ask("key", PRICE_MINOR)).replayed
    assert await teller.money() == (5, 1, 0)


async def test_a_refused_wish_leaves_its_key_unused_and_its_neighbours_alone(teller: Teller) -> None:
    unpaid = await order(teller.system, "bob")
    wishes = [
        teller.ask("a", 9 * PRICE_MINOR),
        teller.ask("b", PRICE_MINOR),
        teller.ask("c", payment_id=12_345),
        teller.ask("d", payment_id=None, order_id=12_345),
        teller.ask("e", payment_id=int(unpaid.payment.id)),
        teller.ask("f", payment_id=None, order_id=int(teller.view.id), amount_minor=PRICE_MINOR),
    ]
    answers = await asyncio.gather(*wishes, return_exceptions=True)
    kinds = [type(answer) for answer in answers]
    assert kinds == [RefundTooLarge, Booked, PaymentNotFound, PaymentNotFound, NothingToRefund, Booked]
    assert not (await teller.ask("a", PRICE_MINOR)).replayed
    assert await teller.money() == (5, 0, 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"payment_id": None},
        {"order_id": 5},
        {"amount_minor": 0},
        {"amount_minor": -1},
        {"amount_minor": 10**13},
        {"reason": ""},
        {"reason": "a\nb"},
        {"reason": "x" * 201},
        {"payment_id": 2**63},
    ],
    ids=str,
)
async def test_a_bad_wish_is_refused(teller: Teller, changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        await teller.ask(**changed)
    assert await count(teller.system, "SELECT id FROM payment_refund") == 0


async def test_a_refund_that_the_provider_refused_frees_its_amount_and_can_be_tried_again(teller: Teller) -> None:
    teller.answers = [RefundAnswer(end=RefundEnd.REFUSED, reason="the account is empty")]
    booked = await teller.ask("key", 4 * PRICE_MINOR)
    await teller.becomes(booked, RefundStatus.REFUSED)
    assert (await teller.system.refunds.get(booked.refund.id)).detail == "the account is empty"
    assert await teller.money() == (5, 0, 0)
    assert await count(teller.system, "SELECT refund_id FROM sandbox_refund") == 0
    await clean_in_time(teller.system, teller.clock)

    other = await teller.ask("other", 2 * PRICE_MINOR)
    with pytest.raises(RefundTooLarge):
        await teller.system.refunds.retry(booked.refund.id, "boss")
    await teller.becomes(other, RefundStatus.DONE)
    third = await teller.ask("third", 3 * PRICE_MINOR)
    await teller.becomes(third, RefundStatus.DONE)
    with pytest.raises(RefundDone):
        await teller.system.refunds.retry(third.refund.id, "boss")
    with pytest.raises(RefundNotFound):
        await teller.system.refunds.retry(12_345, "boss")
    assert await teller.money() == (5, 5, 0)


async def test_a_retried_refund_is_asked_under_its_own_id(teller: Teller) -> None:
    teller.answers = [RefundAnswer(end=RefundEnd.REFUSED, reason="not today")]
    booked = await teller.ask("key")
    await teller.becomes(booked, RefundStatus.REFUSED)
    assert (await teller.system.refunds.retry(booked.refund.id, "chief")).status is RefundStatus.PENDING
    assert await teller.money() == (5, 0, 5)
    await teller.becomes(booked, RefundStatus.DONE)
    assert len(teller.asked) >= 2  # the sweeper may have asked too
    assert set(teller.asked) == {booked.refund.id}
    steps = await teller.system.refunds.steps(booked.refund.id)
    assert [(step["to_status"], step["actor"], step["detail"]) for step in steps] == [
        ("pending", "boss", "a scratch"),
        ("refused", "system", "not today"),
        ("pending", "chief", ""),
        ("done", "system", ""),
    ]


async def test_an_unknown_answer_is_asked_about_again_later_each_time(teller: Teller) -> None:
    await teller.system.stop_work()  # the clock stands still, so nobody else asks
    booked = await teller.ask("key")
    waits = []
    for attempts in (1, 2, 3):
        teller.answers = [RefundAnswer(end=RefundEnd.UNKNOWN)]
        assert await teller.system.refunds.ask(booked.refund.id) is RefundEnd.UNKNOWN
        (row,) = await rows(teller.system, "SELECT status, attempts, ask_us FROM payment_refund")
        assert (row["status"], row["attempts"]) == ("pending", attempts)
        waits.append((row["ask_us"] - teller.clock.now_us()) // 1_000)
        due = await rows(teller.system, "SELECT due_us FROM hf_message WHERE type = 'refund.due'")
        assert due == [{"due_us": row["ask_us"]}]  # one message, however often it was asked
    assert waits == [ASK_AGAIN_MS, 2 * ASK_AGAIN_MS, 4 * ASK_AGAIN_MS]
    for listen in teller.system.listens:
        teller.system.listen(listen)
    await teller.becomes(booked, RefundStatus.DONE)
    assert teller.clock.now_us() - booked.refund.created_us >= waits[-1] * 1_000
    assert len(teller.asked) >= 4
    assert set(teller.asked) == {booked.refund.id}
    assert await count(teller.system, "SELECT refund_id FROM sandbox_refund") == 1
    await clean_in_time(teller.system, teller.clock)


def test_the_wait_doubles_up_to_its_end() -> None:
    assert [ask_again_ms(attempts) for attempts in (1, 2, 3)] == [5_000, 10_000, 20_000]
    assert ask_again_ms(9) == ask_again_ms(10_000) == ASK_AGAIN_MS_MAX


async def test_a_refund_whose_message_is_lost_is_seen_to_by_the_sweeper(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock, work=False)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    await pay(system, view)
    wish = RefundWish(key="key", actor="boss", reason="lost", payment_id=int(view.payment.id))
    booked = await system.refunds.request(wish)
    assert await lose(system, "refund.due") == 1
    system.work()

    async def done() -> bool:
        return (await system.refunds.get(booked.refund.id)).status is RefundStatus.DONE

    await in_time(clock, done, "the refund is done")
    await clean_in_time(system, clock)


async def test_what_happens_to_refunds_is_told_once(teller: Teller) -> None:
    await probe(teller.system, topology.PAY, topology.KEY_REFUND_OPENED, "opened")
    await probe(teller.system, topology.PAY, topology.KEY_REFUNDED, "refunded")
    part = await teller.ask("part", PRICE_MINOR)
    await teller.becomes(part, RefundStatus.DONE)
    rest = await teller.ask("rest")
    await teller.becomes(rest, RefundStatus.DONE)

    opened = await waiting(teller.system, RefundOpened, "opened")
    assert [(each.refund_id, each.amount_minor, each.full) for each in opened] == [
        (part.refund.id, PRICE_MINOR, False),
        (rest.refund.id, 4 * PRICE_MINOR, True),
    ]
    done = await waiting(teller.system, RefundSucceeded, "refunded")
    assert [(each.refund_id, each.refunded_minor, each.captured_minor, each.key_reason) for each in done] == [
        (part.refund.id, PRICE_MINOR, 5 * PRICE_MINOR, "staff"),
        (rest.refund.id, 5 * PRICE_MINOR, 5 * PRICE_MINOR, "staff"),
    ]


async def test_late_money_is_told_of_when_it_is_back_and_not_before(start_system: StartSystem) -> None:
    system = await start_system()
    await stock_up(system, "SKU-1", 1)
    await probe(system, topology.PAY, topology.KEY_REFUND_OPENED, "opened")
    await probe(system, topology.PAY, topology.KEY_REFUNDED, "refunded")
    view = await order(system)
    notice = signed_notice(system, view, system.clock.now_us())
    await system.orders.cancel(int(view.id), "ann")
    await deliver(system, notice)

    async def told() -> bool:
        return len(await waiting(system, RefundSucceeded, "refunded")) == 1

    await eventually(told, "the refund is told of")
    assert [each.key_reason for each in await waiting(system, RefundSucceeded, "refunded")] == ["late"]
    assert await waiting(system, RefundOpened, "opened") == []


async def test_refunds_are_listed_page_by_page(teller: Teller) -> None:
    ids = [(await teller.ask(f"key-{number}", PRICE_MINOR)).refund.id for number in range(3)]
    desk = teller.system.refunds
    first = await desk.list(limit=2)
    rest = await desk.list(limit=2, after=int(first[-1].id))
    assert [int(each.id) for each in (*first, *rest)] == ids
    assert await desk.list(payment_id=12_345) == []
    assert len(await desk.list(payment_id=int(teller.view.payment.id))) == 3
    for limit in (0, 201):
        with pytest.raises(InvalidInput):
            await desk.list(limit=limit)
    with pytest.raises(HoldfastError):
        await desk.get(12_345)
