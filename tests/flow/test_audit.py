"""The audit behind `holdfast verify`: clean after honest work, and each of its checks can fail."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import msgspec
import pytest

from holdfast.audit import CHECKS, ROWS_SHOWN, Report, audit
from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock
from holdfast.db.database import Dialect, Tx
from holdfast.services.orders.model import NotCancellable, OrderStatus, SoldOut
from holdfast.services.payments.sandbox_book import TradeClosed
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.shop import (
    NOON_US,
    PRICE_MINOR,
    becomes,
    bound,
    clean,
    clean_in_time,
    count,
    deliver,
    in_time,
    level,
    level_becomes,
    lose,
    order,
    pay,
    placed_view,
    rows,
    signed_notice,
    stock_up,
    two_systems,
    wish,
)

DROP_STOCK_CHECKS = (
    "ALTER TABLE stock_level DROP CONSTRAINT ck_stock_level_never_negative",
    "ALTER TABLE stock_level DROP CONSTRAINT ck_stock_level_sums_up",
)


class Corruption(msgspec.Struct, frozen=True, kw_only=True):
    """Statements that break one promise behind the services' backs, and the row by which the check has to show it.

    `:name` and the values of `shows` name what `Facts` knows: an order in each state, its details and payments.
    """

    check: str
    breaks: tuple[str, ...]
    shows: dict[str, str]
    how: str = ""
    drops: tuple[str, ...] = ()  # constraints of PostgreSQL that stand in the way; SQLite is told to ignore them

    @property
    def label(self) -> str:
        return f"{self.check} {self.how}".strip()


def one(check: str, sql: str, how: str = "", **shows: str) -> Corruption:
    return Corruption(check=check, breaks=(sql,), shows=shows, how=how)


PARK = """INSERT INTO hf_parked (id, queue, attempt, deliveries, message_id, exchange, routing_key, type, content_type,
                                 headers, body, published_us, reason, parked_us, failed_us, error, group_key, state,
                                 loops, replay_id)
          SELECT id, queue, attempt, deliveries, message_id, exchange, routing_key, type, content_type,
                 headers, body, published_us, 'no retry can help', :now, :now, '', 'all', 'parked', 0, NULL
          FROM hf_message WHERE queue <> 'stock.delay.queue'"""
WAITING = "SELECT id FROM hf_message WHERE queue <> 'stock.delay.queue'"
REPLAYED = "UPDATE hf_parked SET state = 'pending', replay_id = id + 1"

CORRUPTIONS = (
    Corruption(
        check="stock.counters",
        how="negative",
        drops=DROP_STOCK_CHECKS,
        breaks=("UPDATE stock_level SET available = -1, total = held + sold - 1",),
        shows={"sku": "sku"},
    ),
    Corruption(
        check="stock.counters",
        how="sum",
        drops=DROP_STOCK_CHECKS,
        breaks=("UPDATE stock_level SET total = total + 1",),
        shows={"sku": "sku"},
    ),
    one("stock.rows", "UPDATE stock_level SET held = held + 1, total = total + 1", "held", sku="sku"),
    one("stock.rows", "UPDATE stock_level SET sold = sold - 1, total = total - 1", "sold", sku="sku"),
    one("stock.rows", "DELETE FROM stock_task_detail WHERE order_id = :pending", "detail gone", sku="sku"),
    one("stock.ledger_sums", "UPDATE stock_level SET available = available + 1, total = total + 1", sku="sku"),
    one("stock.ledger_sums", "DELETE FROM stock_ledger WHERE kind = 'receive'", "receipt gone", sku="sku"),
    one(
        "stock.ledger_entries",
        "DELETE FROM stock_ledger WHERE kind = 'reserve' AND cause = CAST(:pending_detail AS TEXT)",
        "reserve gone",
        detail_id="pending_detail",
    ),
    one(
        "stock.ledger_entries",
        "DELETE FROM stock_ledger WHERE kind = 'deduct'",
        "deduct gone",
        detail_id="paid_detail",
    ),
    one(
        "stock.ledger_entries",
        "UPDATE stock_ledger SET kind = 'deduct' WHERE kind = 'release' AND cause = CAST(:closed_detail AS TEXT)",
        "wrong kind",
        detail_id="closed_detail",
    ),
    one("stock.ledger_kinds", "UPDATE stock_ledger SET kind = 'adjust' WHERE kind = 'receive'", "no reason", sku="sku"),
    one(
        "stock.ledger_kinds",
        "UPDATE stock_ledger SET sold_delta = 0, available_delta = 3 WHERE kind = 'deduct'",
        "sold into the shelf",
        sku="sku",
    ),
    one(
        "stock.ledger_kinds", "UPDATE stock_ledger SET kind = 'count' WHERE kind = 'receive'", "not counted", sku="sku"
    ),
    one("stock.orders", "UPDATE order_line SET quantity = 7 WHERE order_id = :paid", order_id="paid"),
    one("stock.orders", "DELETE FROM stock_task_detail WHERE id = :paid_detail", "detail gone", order_id="paid"),
    one("stock.ghost_holds", "DELETE FROM order_order WHERE id = :pending", detail_id="pending_detail"),
    one(
        "stock.outcome",
        "UPDATE order_order SET status = 'closed' WHERE id = :paid",
        "sold, not paid",
        detail_id="paid_detail",
    ),
    one(
        "stock.outcome",
        "UPDATE order_order SET status = 'paid' WHERE id = :closed",
        "paid, not sold",
        detail_id="closed_detail",
    ),
    one(
        "stock.outcome",
        "UPDATE stock_task_detail SET status = 2 WHERE id = :pending_detail",
        "given back too early",
        detail_id="pending_detail",
    ),
    one("stock.stranded", "UPDATE stock_task_detail SET status = 1 WHERE id = :paid_detail", detail_id="paid_detail"),
    one(
        "stock.stranded",
        "UPDATE stock_task_detail SET status = 1 WHERE id = :closed_detail",
        "closed",
        detail_id="closed_detail",
    ),
    one("orders.path", "UPDATE order_order SET status = 'paid' WHERE id = :pending", "no entry", order_id="pending"),
    one("orders.path", "DELETE FROM order_log WHERE order_id = :paid", "no log", order_id="paid"),
    one(
        "orders.path",
        "DELETE FROM order_log WHERE order_id = :paid AND from_status IS NULL",
        "no start",
        order_id="paid",
    ),
    one(
        "orders.path",
        "UPDATE order_log SET to_status = 'cancelled' WHERE order_id = :closed AND to_status = 'closed'",
        "another end",
        order_id="closed",
    ),
    one(
        "orders.path",
        "UPDATE order_log SET from_status = 'cancelled' WHERE order_id = :paid AND to_status = 'paid'",
        "no such edge",
        order_id="paid",
    ),
    one(
        "orders.path",
        """INSERT INTO order_log (id, order_id, from_status, to_status, actor, note, at_us)
           VALUES (1, :closed, 'pending_payment', 'paid', 'nobody', '', :now)""",
        "two ends",
        order_id="closed",
    ),
    one(
        "orders.path",
        """INSERT INTO order_log (id, order_id, from_status, to_status, actor, note, at_us)
           VALUES (1, :paid, 'paid', 'shipped', 'nobody', '', :now)""",
        "goes on after its end",
        order_id="paid",
    ),
    one("orders.log_without_order", "DELETE FROM order_order WHERE id = :closed", order_id="closed"),
    one("orders.amount", "UPDATE order_order SET amount_minor = amount_minor - 1 WHERE id = :paid", order_id="paid"),
    one("orders.amount", "DELETE FROM order_line WHERE order_id = :paid", "lines gone", order_id="paid"),
    one("orders.reply", "DELETE FROM order_reply WHERE order_id = :paid", "gone", order_id="paid"),
    one("orders.reply", "UPDATE order_reply SET buyer = 'eve' WHERE order_id = :paid", "another's", order_id="paid"),
    one(
        "orders.reply",
        """INSERT INTO order_reply (key, buyer, fingerprint, order_id, body, created_us)
           SELECT 'another key', buyer, fingerprint, order_id, body, created_us FROM order_reply
           WHERE order_id = :paid""",
        "two",
        order_id="paid",
    ),
    one("orders.overdue", "UPDATE order_order SET pay_by_us = :now - 1 WHERE id = :pending", order_id="pending"),
    one("money.payment_order", "DELETE FROM payment_order WHERE order_id = :pending", "gone", order_id="pending"),
    one(
        "money.payment_order",
        "UPDATE payment_order SET amount_minor = 1 WHERE order_id = :pending",
        "amount",
        order_id="pending",
    ),
    one(
        "money.payment_order",
        "UPDATE payment_order SET currency = 'EUR' WHERE order_id = :pending",
        "currency",
        order_id="pending",
    ),
    one(
        "money.payment_order",
        "UPDATE payment_order SET buyer = 'eve' WHERE order_id = :pending",
        "buyer",
        order_id="pending",
    ),
    one("money.paid", "UPDATE payment_order SET captured_minor = 0 WHERE order_id = :paid", order_id="paid"),
    one(
        "money.paid",
        "UPDATE payment_order SET refunded_minor = captured_minor WHERE order_id = :paid",
        "refund",
        order_id="paid",
    ),
    one("money.refunded", "UPDATE order_order SET refunded_minor = 1 WHERE id = :paid", "untold", order_id="paid"),
    one(
        "money.refunded",
        "UPDATE order_order SET status = 'refunded' WHERE id = :paid",
        "not given back",
        order_id="paid",
    ),
    one("money.kept", "UPDATE payment_order SET refunded_minor = 0 WHERE order_id = :refunded", order_id="refunded"),
    one(
        "money.unnoticed",
        "UPDATE payment_order SET status = 3, captured_minor = amount_minor WHERE order_id = :pending",
        order_id="pending",
    ),
    one("money.unaccepted", "UPDATE payment_order SET accepted_us = NULL WHERE order_id = :paid", order_id="paid"),
    one("money.payable", "UPDATE payment_order SET status = 2 WHERE order_id = :pending", order_id="pending"),
    one("money.refunds", "DELETE FROM payment_refund", payment_id="refunded_payment"),
    one("money.refunds", "UPDATE payment_refund SET amount_minor = 1", "amount", payment_id="refunded_payment"),
    one(
        "money.refunds",
        "UPDATE payment_order SET refunding_minor = 1 WHERE order_id = :paid",
        "reserved",
        payment_id="paid_payment",
    ),
    one("money.refund_overdue", "UPDATE payment_refund SET status = 'pending'", payment_id="refunded_payment"),
    one(
        "money.notices",
        "UPDATE payment_notice SET verdict = 'wrong_facts' WHERE payment_id = :paid_payment",
        "wrong facts",
        payment_id="paid_payment",
    ),
    one(
        "money.notices",
        "UPDATE payment_notice SET verdict = 'second_trade' WHERE payment_id = :paid_payment",
        "second trade",
        payment_id="paid_payment",
    ),
    one(
        "money.notices",
        "UPDATE payment_notice SET verdict = 'unknown_payment' WHERE payment_id = :paid_payment",
        "unknown payment",
        payment_id="paid_payment",
    ),
    one("messages.unsent", "UPDATE hf_message SET due_us = :now - 1", row_id="pending_message"),
    one("messages.parked", PARK, row_id="pending_message"),
    Corruption(check="messages.replays", breaks=(PARK, REPLAYED), shows={"row_id": "pending_message"}),
)

# Rows that are missing, or that belong to nothing; all the others agree with each other.
UNSEEN = (
    Corruption(
        check="an answered order that vanished",
        breaks=tuple(
            f"DELETE FROM {table} WHERE {key} = :paid"
            for table, key in (("order_order", "id"), ("order_line", "order_id"), ("order_log", "order_id"))
        ),
        shows={},
    ),
    one("a counter that vanished", "DELETE FROM stock_level"),
    Corruption(
        check="units held for a SKU that is not on the order",
        breaks=(
            """INSERT INTO stock_level (sku, warehouse, available, held, sold, total, version)
               VALUES ('SKU-2', 'main', 0, 1, 0, 1, 1)""",
            """INSERT INTO stock_task_detail (id, task_id, order_id, sku, warehouse, quantity, status, changed_us)
               SELECT 1, task_id, order_id, 'SKU-2', 'main', 1, 1, changed_us FROM stock_task_detail
               WHERE id = :pending_detail""",
            """INSERT INTO stock_ledger (id, sku, warehouse, kind, cause, available_delta, held_delta, sold_delta,
                                         actor, at_us)
               VALUES (1, 'SKU-2', 'main', 'receive', 'one more', 1, 0, 0, 'tests', 1),
                      (2, 'SKU-2', 'main', 'reserve', '1', -1, 1, 0, 'tests', 1)""",
        ),
        shows={},
    ),
    Corruption(
        check="money taken for an order that does not exist",
        breaks=(
            """INSERT INTO payment_order (id, order_id, buyer, provider, amount_minor, currency, status, trade_no,
                                          captured_minor, refunded_minor, captured_us, accepted_us, pay_by_us,
                                          refunding_minor, created_us, changed_us)
               SELECT 1, 1, buyer, provider, amount_minor, currency, status, trade_no,
                      captured_minor, refunded_minor, captured_us, accepted_us, pay_by_us, refunding_minor,
                      created_us, changed_us
               FROM payment_order WHERE order_id = :paid""",
        ),
        shows={},
    ),
)


class Undone(Exception):
    """Raised to take a corruption back."""


class Inside:
    """A database as an open transaction sees it."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self.dialect: Dialect = tx.dialect

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        yield self._tx

    def single(self) -> AbstractAsyncContextManager[Tx]:
        return self.transaction()

    @asynccontextmanager
    async def read(self, *, snapshot: bool = False) -> AsyncIterator[Tx]:
        yield self._tx

    async def close(self) -> None:
        pass


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A shop at rest, and what can be named in a corruption."""

    system: System
    clock: ManualClock
    names: dict[str, int | str]

    async def audit(self) -> Report:
        return await audit(self.system.database, self.clock, 0)

    async def audit_with(self, corruption: Corruption) -> Report:
        """What the audit says while the corruption is there; it is taken back afterwards."""
        reports: list[Report] = []
        with suppress(Undone):
            async with self.system.database.transaction() as tx:
                await self._plant(tx, corruption)
                reports.append(await audit(Inside(tx), self.clock, 0))
                raise Undone
        return reports[0]

    async def _plant(self, tx: Tx, corruption: Corruption) -> None:
        if tx.dialect == "sqlite":
            await tx.connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        else:
            for statement in corruption.drops:
                await tx.connection.exec_driver_sql(statement)
        for statement in corruption.breaks:
            used = {name: self.names[name] for name in re.findall(r":([a-z_]+)", statement)}
            assert (await tx.execute(bound(statement, used))).rowcount > 0, f"{corruption.label} met no row"


@pytest.fixture
async def facts(start_system: StartSystem, settings: Settings) -> Facts:
    """A shop at rest with an order that is paid, one that waits, one that closed, one cancelled and then refunded."""
    clock = ManualClock(NOON_US)
    system = await start_system(clock=clock)
    await stock_up(system, "SKU-1", 20)
    closed = await order(system, "cleo", quantity=2)
    clock.advance(60)
    await becomes(system, closed, OrderStatus.CLOSED, "cleo")
    paid = await order(system, "paul", quantity=3)
    await pay(system, paid)
    refunded = await order(system, "rita")
    notice = signed_notice(system, refunded, clock.now_us())
    await system.orders.cancel(int(refunded.id), "rita")
    await deliver(system, notice)
    pending = await order(system, "penny", quantity=4)
    await level_becomes(system, available=13, held=4, sold=3)
    await clean_in_time(system, clock)

    async def at_rest() -> bool:
        # All that is left is the deadline of the order that waits, and what guards the holds.
        return await count(system, WAITING) == 1

    await in_time(clock, at_rest, "all messages are handled")
    await system.stop_work()
    clock.advance(1)
    assert (await audit(system.database, clock, 0)).clean
    details = {row["order_id"]: row["id"] for row in await rows(system, "SELECT id, order_id FROM stock_task_detail")}
    (message,) = await rows(system, WAITING)
    names: dict[str, int | str] = {
        "sku": "SKU-1",
        "now": clock.now_us(),
        "pending_message": message["id"],
    }
    for name, view in (("closed", closed), ("paid", paid), ("refunded", refunded), ("pending", pending)):
        names[name] = int(view.id)
        names[f"{name}_detail"] = details[int(view.id)]
        names[f"{name}_payment"] = int(view.payment.id)
    return Facts(system=system, clock=clock, names=names)


@pytest.mark.parametrize("name", [check.name for check in CHECKS])
async def test_each_check_reports_the_row_that_breaks_its_promise(facts: Facts, name: str) -> None:
    for corruption in (corruption for corruption in CORRUPTIONS if corruption.check == name):
        report = await facts.audit_with(corruption)

        assert not report.clean, corruption.label
        findings = {finding.name: finding for finding in report.findings}
        assert name in findings, corruption.label
        finding = findings[name]
        shown = {column: facts.names[named] for column, named in corruption.shows.items()}
        assert shown in [{column: row[column] for column in shown} for row in finding.rows], corruption.label
        assert finding.count == len(finding.rows)
    assert (await facts.audit()).clean


def test_every_check_has_a_corruption() -> None:
    assert {corruption.check for corruption in CORRUPTIONS} == {check.name for check in CHECKS}
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("corruption", UNSEEN, ids=lambda corruption: corruption.label)
async def test_a_row_that_is_missing_or_belongs_to_nothing_is_reported(facts: Facts, corruption: Corruption) -> None:
    assert not (await facts.audit_with(corruption)).clean


async def test_the_audit_is_clean_after_a_mixed_run(start_system: StartSystem, settings: Settings) -> None:
    chance = random.Random(7)
    systems = await two_systems(start_system, settings)
    for sku in ("SKU-1", "SKU-2"):
        for warehouse in ("east", "west"):
            await stock_up(systems[0], sku, 20, warehouse)

    async def visit(number: int) -> str:
        buyer = f"buyer-{number}"
        system = systems[number % len(systems)]
        other = systems[-1 - number % len(systems)]
        sku, quantity, deed = chance.choice(("SKU-1", "SKU-2")), chance.randint(1, 3), chance.randrange(5)
        try:
            view = placed_view(await system.orders.place(wish(buyer, sku, quantity)))
        except SoldOut:
            return "sold out"
        again = await other.orders.place(wish(buyer, sku, quantity))
        assert placed_view(again) == view
        if deed == 0:
            return "waits"
        if deed == 1:
            await system.orders.cancel(int(view.id), buyer)
            return "cancelled"
        if deed == 2:  # the money is captured in time, and its notice comes after the buyer has cancelled
            notice = signed_notice(system, view, system.clock.now_us())
            await other.orders.cancel(int(view.id), buyer)
            await asyncio.gather(deliver(system, notice), deliver(other, notice))
            return "refunded"
        if deed == 3:
            paying, cancelling = await asyncio.gather(
                pay(system, view), other.orders.cancel(int(view.id), buyer), return_exceptions=True
            )
            assert isinstance(paying, TradeClosed) != isinstance(cancelling, NotCancellable)
            return "cancelled" if paying else "paid"
        await pay(other, view)
        return "paid"

    outcomes = await asyncio.gather(*(visit(number) for number in range(80)))

    await clean(systems[0])
    report = await audit(systems[0].database, systems[0].clock, 0)
    assert report.checks == len(CHECKS)
    figures = report.figures
    assert figures["orders pending_payment"] == outcomes.count("waits")
    assert figures["orders paid"] == outcomes.count("paid")
    assert figures["orders cancelled"] == outcomes.count("cancelled") + outcomes.count("refunded")
    assert figures["units total"] == 80
    assert figures["units available"] + figures["units held"] + figures["units sold"] == 80
    assert figures["captured minor"] - figures["refunded minor"] == figures["units sold"] * PRICE_MINOR
    assert figures["messages waiting"] == outcomes.count("waits")
    assert figures["messages parked"] == 0


async def test_the_first_rows_are_shown_and_all_are_counted(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(work=False, clock=clock)
    await stock_up(system, "SKU-1", 100)
    await asyncio.gather(*(order(system, f"buyer-{number}") for number in range(ROWS_SHOWN + 5)))
    clock.advance(61)

    report = await audit(system.database, clock, 0)

    (finding,) = [finding for finding in report.findings if finding.name == "orders.overdue"]
    assert finding.count == ROWS_SHOWN + 5
    assert len(finding.rows) == ROWS_SHOWN


async def test_what_is_late_by_less_than_the_slack_is_no_finding(start_system: StartSystem) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(work=False, clock=clock)
    await stock_up(system, "SKU-1", 1)
    await order(system)
    await lose(system, "order.created")  # it waits for the event feed and would be late by all of this time
    clock.advance(65)

    assert (await audit(system.database, clock, 5_000)).clean
    report = await audit(system.database, clock, 4_999)

    assert {finding.name for finding in report.findings} == {"orders.overdue", "messages.unsent"}
    (overdue,) = [finding for finding in report.findings if finding.name == "orders.overdue"]
    assert overdue.rows[0]["pay_by_us"] == NOON_US + 60 * US_PER_S


async def test_the_audit_changes_nothing_and_can_run_while_orders_are_placed(system: System) -> None:
    await stock_up(system, "SKU-1", 40)

    async def look() -> None:
        for _ in range(5):
            report = await audit(system.database, system.clock, 60_000)
            assert report.clean, report.findings

    async def shop(number: int) -> None:
        view = await order(system, f"buyer-{number}")
        await pay(system, view)

    await asyncio.gather(look(), look(), *(shop(number) for number in range(40)))

    await level_becomes(system, sold=40)
    assert (await level(system)).available == 0
    await clean(system)
