"""The audit behind `holdfast verify`: read-only checks of a live database, over one snapshot.

Each check is a query for the rows that must not exist. `now_us` is the auditor's clock; `slack_us` is how late the
machinery may be (messages in flight, an order just past its deadline) before that counts as a finding.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import BigInteger, BindParameter, TextClause, bindparam, text

from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database
from holdfast.services.orders.model import EDGES
from holdfast.services.payments.model import PARKED

ROWS_SHOWN = 20


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A statement about the data and the query for the rows that break it."""

    name: str
    promise: str
    query: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A check with the rows that break it, the first of them shown."""

    name: str
    promise: str
    count: int
    rows: tuple[dict[str, Any], ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the audit saw."""

    clean: bool
    checks: int
    figures: dict[str, int]
    findings: tuple[Finding, ...]


_EDGES = " OR ".join(
    f"(from_status = '{came}' AND to_status = '{to}')" for came, targets in EDGES.items() for to in sorted(targets)
)
_PARKED = ", ".join(f"'{verdict}'" for verdict in sorted(PARKED))

STOCK = (
    Check(
        name="stock.counters",
        promise="available, held and sold are never negative and sum up to the total",
        query="""SELECT sku, warehouse, available, held, sold, total FROM stock_level
                 WHERE available < 0 OR held < 0 OR sold < 0 OR available + held + sold <> total""",
    ),
    Check(
        name="stock.rows",
        promise="held and sold equal what the work orders say",
        query="""SELECT level.sku, level.warehouse, level.held, level.sold,
                        coalesce(sum(CASE detail.status WHEN 1 THEN detail.quantity END), 0) AS held_by_rows,
                        coalesce(sum(CASE detail.status WHEN 3 THEN detail.quantity END), 0) AS sold_by_rows
                 FROM stock_level level LEFT JOIN stock_task_detail detail
                      ON detail.sku = level.sku AND detail.warehouse = level.warehouse
                 GROUP BY level.sku, level.warehouse, level.held, level.sold
                 HAVING level.held <> coalesce(sum(CASE detail.status WHEN 1 THEN detail.quantity END), 0)
                     OR level.sold <> coalesce(sum(CASE detail.status WHEN 3 THEN detail.quantity END), 0)
                 UNION ALL
                 SELECT detail.sku, detail.warehouse, NULL, NULL, sum(detail.quantity), NULL
                 FROM stock_task_detail detail LEFT JOIN stock_level level
                      ON level.sku = detail.sku AND level.warehouse = detail.warehouse
                 WHERE level.sku IS NULL GROUP BY detail.sku, detail.warehouse""",
    ),
    Check(
        name="stock.ledger_sums",
        promise="the ledger's sums equal the counters",
        query="""SELECT level.sku, level.warehouse, level.available, level.held, level.sold,
                        coalesce(sum(entry.available_delta), 0) AS available_by_ledger,
                        coalesce(sum(entry.held_delta), 0) AS held_by_ledger,
                        coalesce(sum(entry.sold_delta), 0) AS sold_by_ledger
                 FROM stock_level level LEFT JOIN stock_ledger entry
                      ON entry.sku = level.sku AND entry.warehouse = level.warehouse
                 GROUP BY level.sku, level.warehouse, level.available, level.held, level.sold
                 HAVING level.available <> coalesce(sum(entry.available_delta), 0)
                     OR level.held <> coalesce(sum(entry.held_delta), 0)
                     OR level.sold <> coalesce(sum(entry.sold_delta), 0)
                 UNION ALL
                 SELECT entry.sku, entry.warehouse, NULL, NULL, NULL, sum(entry.available_delta),
                        sum(entry.held_delta), sum(entry.sold_delta)
                 FROM stock_ledger entry LEFT JOIN stock_level level
                      ON level.sku = entry.sku AND level.warehouse = entry.warehouse
                 WHERE level.sku IS NULL GROUP BY entry.sku, entry.warehouse""",
    ),
    Check(
        name="stock.ledger_entries",
        promise="each work order detail has the ledger entries of its state, and no other",
        query="""SELECT detail.id AS detail_id, detail.status, count(entry.id) AS entries
                 FROM stock_task_detail detail LEFT JOIN stock_ledger entry
                      ON entry.cause = CAST(detail.id AS TEXT) AND entry.kind <> 'receive'
                 GROUP BY detail.id, detail.status
                 HAVING count(entry.id) <> CASE detail.status WHEN 1 THEN 1 ELSE 2 END
                     OR coalesce(sum(CASE WHEN entry.kind = 'reserve'
                                            OR (entry.kind = 'release' AND detail.status = 2)
                                            OR (entry.kind = 'deduct' AND detail.status = 3) THEN 1 END), 0)
                        <> CASE detail.status WHEN 1 THEN 1 ELSE 2 END""",
    ),
    Check(
        name="stock.orders",
        promise="each order holds exactly the units of its lines",
        query="""SELECT line.order_id, line.sku, line.quantity, coalesce(sum(detail.quantity), 0) AS quantity_by_details
                 FROM order_line line LEFT JOIN stock_task_detail detail
                      ON detail.order_id = line.order_id AND detail.sku = line.sku
                 GROUP BY line.order_id, line.sku, line.quantity
                 HAVING line.quantity <> coalesce(sum(detail.quantity), 0)
                 UNION ALL
                 SELECT detail.order_id, detail.sku, 0, sum(detail.quantity)
                 FROM stock_task_detail detail LEFT JOIN order_line line
                      ON line.order_id = detail.order_id AND line.sku = detail.sku
                 WHERE line.order_id IS NULL AND detail.status <> 2 GROUP BY detail.order_id, detail.sku""",
    ),
    Check(
        name="stock.ghost_holds",
        promise="nothing is held for, or sold to, an order that does not exist",
        query="""SELECT detail.id AS detail_id, detail.order_id FROM stock_task_detail detail
                 LEFT JOIN order_order o ON o.id = detail.order_id WHERE o.id IS NULL AND detail.status <> 2""",
    ),
    Check(
        name="stock.outcome",
        promise="what is sold belongs to paid orders, what is given back to unpaid ones",
        query="""SELECT detail.id AS detail_id, detail.order_id, detail.status, o.status AS order_status
                 FROM stock_task_detail detail JOIN order_order o ON o.id = detail.order_id
                 WHERE (detail.status = 3 AND o.status IN ('pending_payment', 'cancelled', 'closed'))
                    OR (detail.status = 2 AND o.status NOT IN ('cancelled', 'closed'))""",
    ),
    Check(
        name="stock.stranded",
        promise="an ended or paid order holds no units any more",
        query="""SELECT detail.id AS detail_id, detail.order_id, detail.sku, detail.quantity, o.status AS order_status
                 FROM stock_task_detail detail JOIN order_order o ON o.id = detail.order_id
                 WHERE detail.status = 1 AND o.status <> 'pending_payment' AND o.changed_us < :now_us - :slack_us""",
    ),
)

ORDERS = (
    Check(
        name="orders.path",
        promise="each order's log is a path of the graph that ends in its state",
        query=f"""SELECT o.id AS order_id, o.status, count(entry.id) AS entries,
                         sum(CASE WHEN entry.from_status IS NULL AND entry.to_status = 'pending_payment' THEN 1
                                  ELSE 0 END) AS starts,
                         sum(CASE WHEN {_EDGES} THEN 1 ELSE 0 END) AS edges
                  FROM order_order o LEFT JOIN order_log entry ON entry.order_id = o.id
                  GROUP BY o.id, o.status
                  HAVING sum(CASE WHEN entry.from_status IS NULL AND entry.to_status = 'pending_payment' THEN 1
                                  ELSE 0 END) <> 1
                      OR sum(CASE WHEN {_EDGES} THEN 1 ELSE 0 END) <> count(entry.id) - 1
                      OR sum(CASE WHEN entry.to_status = o.status THEN 1 ELSE 0 END) <> 1
                      OR sum(CASE WHEN entry.from_status = o.status THEN 1 ELSE 0 END) <> 0
                      OR count(DISTINCT entry.from_status) <> count(entry.id) - 1
                  UNION ALL
                  SELECT entry.order_id, entry.from_status, 1, 0, 0 FROM order_log entry
                  WHERE entry.from_status IS NOT NULL AND NOT EXISTS (
                      SELECT 1 FROM order_log before
                      WHERE before.order_id = entry.order_id AND before.to_status = entry.from_status)
               """,  # noqa: S608  # constants of ours
    ),
    Check(
        name="orders.log_without_order",
        promise="each log entry belongs to an order",
        query="""SELECT entry.id AS entry_id, entry.order_id FROM order_log entry
                 LEFT JOIN order_order o ON o.id = entry.order_id WHERE o.id IS NULL""",
    ),
    Check(
        name="orders.amount",
        promise="each order's amount is the sum of its lines",
        query="""SELECT o.id AS order_id, o.amount_minor, coalesce(sum(line.quantity * line.price_minor), 0) AS by_lines
                 FROM order_order o LEFT JOIN order_line line ON line.order_id = o.id
                 GROUP BY o.id, o.amount_minor
                 HAVING o.amount_minor <> coalesce(sum(line.quantity * line.price_minor), 0)""",
    ),
    Check(
        name="orders.reply",
        promise="each order has one stored answer, each stored answer its order",
        query="""SELECT o.id AS order_id, count(reply.key) AS replies FROM order_order o
                 LEFT JOIN order_reply reply ON reply.order_id = o.id AND reply.buyer = o.buyer
                 GROUP BY o.id HAVING count(reply.key) <> 1
                 UNION ALL
                 SELECT reply.order_id, 1 FROM order_reply reply LEFT JOIN order_order o ON o.id = reply.order_id
                 WHERE o.id IS NULL""",
    ),
    Check(
        name="orders.overdue",
        promise="no order waits for payment past its deadline",
        query="""SELECT id AS order_id, pay_by_us FROM order_order
                 WHERE status = 'pending_payment' AND pay_by_us < :now_us - :slack_us""",
    ),
)

MONEY = (
    Check(
        name="money.payment_order",
        promise="each order that costs something has one payment order over its amount, each payment order its order",
        query="""SELECT o.id AS order_id, o.amount_minor, payment.amount_minor AS payment_amount_minor
                 FROM order_order o LEFT JOIN payment_order payment ON payment.order_id = o.id
                 WHERE (payment.id IS NULL) <> (o.amount_minor = 0) OR payment.amount_minor <> o.amount_minor
                    OR payment.currency <> o.currency OR payment.buyer <> o.buyer
                 UNION ALL
                 SELECT payment.order_id, NULL, payment.amount_minor FROM payment_order payment
                 LEFT JOIN order_order o ON o.id = payment.order_id WHERE o.id IS NULL""",
    ),
    Check(
        name="money.paid",
        promise="of a paid order its amount was captured, and not all of it given back",
        query="""SELECT o.id AS order_id, o.amount_minor, payment.captured_minor, payment.refunded_minor
                 FROM order_order o JOIN payment_order payment ON payment.order_id = o.id
                 WHERE o.status IN ('paid', 'shipped', 'completed')
                   AND (payment.captured_minor <> o.amount_minor
                        OR (payment.refunded_minor >= payment.captured_minor
                            AND payment.changed_us < :now_us - :slack_us))""",
    ),
    Check(
        name="money.refunded",
        promise="of a refunded order everything was given back, and orders know what was",
        query="""SELECT o.id AS order_id, o.status, payment.captured_minor, payment.refunded_minor,
                        o.refunded_minor AS refunded_by_order
                 FROM order_order o JOIN payment_order payment ON payment.order_id = o.id
                 WHERE (o.status = 'refunded' AND payment.refunded_minor <> payment.captured_minor)
                    OR (o.refunded_minor <> payment.refunded_minor AND payment.changed_us < :now_us - :slack_us
                        AND o.status NOT IN ('cancelled', 'closed'))""",
    ),
    Check(
        name="money.kept",
        promise="no money is kept for an order that was cancelled or closed",
        query="""SELECT o.id AS order_id, o.status, payment.captured_minor, payment.refunded_minor
                 FROM order_order o JOIN payment_order payment ON payment.order_id = o.id
                 WHERE o.status IN ('cancelled', 'closed') AND payment.captured_minor <> payment.refunded_minor
                   AND payment.changed_us < :now_us - :slack_us""",
    ),
    Check(
        name="money.unnoticed",
        promise="a payment that succeeded has reached its order",
        query="""SELECT o.id AS order_id, payment.id AS payment_id
                 FROM order_order o JOIN payment_order payment ON payment.order_id = o.id
                 WHERE o.status = 'pending_payment' AND payment.status = 3
                   AND payment.changed_us < :now_us - :slack_us""",
    ),
    Check(
        name="money.payable",
        promise="an order that waits for payment can be paid",
        query="""SELECT o.id AS order_id, payment.status FROM order_order o
                 JOIN payment_order payment ON payment.order_id = o.id
                 WHERE o.status = 'pending_payment' AND payment.status = 2""",
    ),
    Check(
        name="money.refunds",
        promise="refunded money equals the refunds that are done",
        query="""SELECT payment.id AS payment_id, payment.refunded_minor,
                        coalesce(sum(refund.amount_minor), 0) AS by_refunds
                 FROM payment_order payment
                 LEFT JOIN payment_refund refund ON refund.payment_id = payment.id AND refund.status = 'done'
                 GROUP BY payment.id, payment.refunded_minor
                 HAVING payment.refunded_minor <> coalesce(sum(refund.amount_minor), 0)""",
    ),
    Check(
        name="money.refund_overdue",
        promise="no refund waits",
        query="""SELECT id AS refund_id, payment_id, amount_minor FROM payment_refund
                 WHERE status = 'pending' AND created_us < :now_us - :slack_us""",
    ),
    Check(
        name="money.notices",
        promise="no notice is parked for a human",
        query=f"""SELECT provider, event_id, payment_id, verdict FROM payment_notice
                  WHERE verdict IN ({_PARKED})""",  # noqa: S608  # constants of ours
    ),
)

MESSAGES = (
    Check(
        name="messages.unsent",
        promise="no message is due and undelivered",
        query="""SELECT id AS row_id, queue, type, message_id, attempt, due_us FROM hf_message
                 WHERE due_us < :now_us - :slack_us""",
    ),
    Check(
        name="messages.parked",
        promise="no message is parked for a human",
        query="""SELECT id AS row_id, queue, type, message_id, attempt, reason FROM hf_parked WHERE state = 'parked'""",
    ),
    Check(
        name="messages.replays",
        promise="each parked message that is being replayed has its message in the queue",
        query="""SELECT parked.id AS row_id, parked.queue, parked.type, parked.message_id, parked.replay_id
                 FROM hf_parked parked
                 LEFT JOIN hf_message replay ON replay.id = parked.replay_id AND replay.queue = parked.queue
                 WHERE parked.state = 'pending' AND replay.id IS NULL""",
    ),
)

CHECKS = STOCK + ORDERS + MONEY + MESSAGES

FIGURES = """
    SELECT 'orders ' || status AS name, count(*) AS value FROM order_order GROUP BY status
    UNION ALL SELECT 'units available', coalesce(sum(available), 0) FROM stock_level
    UNION ALL SELECT 'units held', coalesce(sum(held), 0) FROM stock_level
    UNION ALL SELECT 'units sold', coalesce(sum(sold), 0) FROM stock_level
    UNION ALL SELECT 'units total', coalesce(sum(total), 0) FROM stock_level
    UNION ALL SELECT 'captured minor', coalesce(sum(captured_minor), 0) FROM payment_order
    UNION ALL SELECT 'refunded minor', coalesce(sum(refunded_minor), 0) FROM payment_order
    UNION ALL SELECT 'messages waiting', count(*) FROM hf_message
    UNION ALL SELECT 'messages parked', count(*) FROM hf_parked WHERE state = 'parked'
"""


async def audit(database: Database, clock: Clock, slack_ms: int) -> Report:
    """Run every check over one snapshot; reads only. `slack_ms` is how late the machinery may be."""
    times = {"now_us": clock.now_us(), "slack_us": slack_ms * US_PER_MS}
    findings = []
    async with database.read(snapshot=True) as tx:
        for check in CHECKS:
            rows = (await tx.execute(_statement(check.query, times))).all()
            if rows:
                shown = tuple(dict(row._mapping) for row in rows[:ROWS_SHOWN])
                findings.append(Finding(name=check.name, promise=check.promise, count=len(rows), rows=shown))
        figures = {row.name: int(row.value) for row in await tx.execute(text(FIGURES))}
    return Report(clean=not findings, checks=len(CHECKS), figures=figures, findings=tuple(findings))


def _statement(query: str, times: dict[str, int]) -> TextClause:
    used: list[BindParameter[int]] = [
        bindparam(name, value, BigInteger) for name, value in times.items() if f":{name}" in query
    ]
    return text(query).bindparams(*used)
