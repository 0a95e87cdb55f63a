"""What must hold when the shop has come to rest: the history of the crowd against the rows of the database."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import asyncpg
import msgspec
from sqlalchemy import make_url

from tests.faults.crowd import Client, History, Order, Wish, place
from tests.faults.processes import Shop

SETTLED_S = 60.0
POLL_S = 0.1
READERS_AT_ONCE = 16

ORDERS = """
    SELECT reply.key AS key, reply.buyer AS buyer, o.id AS id, o.status AS status, o.amount_minor AS amount,
           payment.captured_minor AS captured, payment.refunded_minor AS refunded,
           (SELECT count(*) FROM payment_refund refund WHERE refund.payment_id = payment.id) AS refunds
    FROM order_order o
    LEFT JOIN order_reply reply ON reply.order_id = o.id
    LEFT JOIN payment_order payment ON payment.order_id = o.id
"""

UNDER_WAY = """
    SELECT 'orders' AS what, count(*) AS count FROM order_order WHERE status = 'pending_payment'
    UNION ALL SELECT 'holds', count(*) FROM stock_task_detail WHERE status = 1
    UNION ALL SELECT 'refunds', count(*) FROM payment_refund WHERE status = 'pending'
    UNION ALL SELECT 'messages', count(*) FROM hf_message
"""

Row = dict[str, Any]


async def rows(url: str, query: str) -> list[Row]:
    """What a query finds, asked of the database directly."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(f"file:{make_url(url).database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]
    postgres = await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))
    try:
        return [dict(row) for row in await postgres.fetch(query)]
    finally:
        await postgres.close()


async def change(url: str, statement: str) -> None:
    """Change the database by hand, behind everybody's back."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(url).database or "")) as connection:
            assert connection.execute(statement).rowcount == 1
            connection.commit()
        return
    postgres = await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))
    try:
        assert await postgres.execute(statement) == "UPDATE 1"
    finally:
        await postgres.close()


async def violations(shop: Shop, client: Client, history: History) -> list[str]:
    """Everything that was promised and does not hold; waits for the shop to come to rest first."""
    found = list(history.surprises)
    found += await _at_rest(shop)
    found += await _integrity(shop.url)
    booked = await rows(shop.url, ORDERS)
    found += _strangers(booked, history)
    by_key = {row["key"]: row for row in booked}
    found += [f"{key} was refused as {why} and has an order" for key, why in history.refused.items() if key in by_key]
    for key, body in history.placed.items():
        order = msgspec.json.decode(body, type=Order)
        if key not in by_key:
            found.append(f"LOST: order {order.id} of {key} was acknowledged and does not exist")
        elif str(by_key[key]["id"]) != order.id:
            found.append(f"{key} was acknowledged as order {order.id} and is in the book as {by_key[key]['id']}")
    found += _wrong_ends({str(row["id"]): row for row in booked}, history)
    found += await _answers_changed(client, history)
    return found + shop.complaints()


async def _at_rest(shop: Shop) -> list[str]:
    """Wait until nothing is under way any more, then poll `holdfast verify --slack-ms 0` until it is clean."""
    deadline = time.monotonic() + SETTLED_S
    while left := [row for row in await rows(shop.url, UNDER_WAY) if row["count"]]:
        if time.monotonic() > deadline:
            return [f"not at rest after {SETTLED_S} s, still under way: {left}"]
        await asyncio.sleep(POLL_S)
    while True:
        code, verdict = await shop.verify()
        if code == 0 and verdict.clean:
            return []
        if time.monotonic() > deadline:
            return [f"verify ended with {code}: {finding}" for finding in verdict.findings] or [f"{code}: {verdict}"]


async def _integrity(url: str) -> list[str]:
    if not url.startswith("sqlite"):
        return []
    found = [row["integrity_check"] for row in await rows(url, "PRAGMA integrity_check")]
    return [] if found == ["ok"] else [f"SQLite is corrupt: {found[:5]}"]


def _strangers(booked: Iterable[Row], history: History) -> list[str]:
    """Orders that nobody asked for, and wishes that became two orders."""
    found, seen = [], set()
    for row in booked:
        if row["key"] is None or history.asked.get(row["key"], Wish("", "", b"")).buyer != row["buyer"]:
            found.append(f"nobody asked for order {row['id']}: {row}")
        elif row["key"] in seen:
            found.append(f"{row['key']} has two orders")
        seen.add(row["key"])
    return found


def _wrong_ends(by_id: dict[str, Row], history: History) -> list[str]:
    """Acknowledged orders that did not end as was acknowledged, by status and by money."""

    def kept(row: Row) -> bool:
        return row["status"] == "paid" and (row["captured"], row["refunded"], row["refunds"]) == (row["amount"], 0, 0)

    def refunded_once(row: Row) -> bool:
        money = (row["captured"], row["refunded"], row["refunds"])
        return row["status"] in ("cancelled", "closed") and money == (row["amount"], row["amount"], 1)

    promises: list[tuple[str, set[str], Callable[[Row], bool]]] = [
        ("was cancelled", history.cancelled, lambda row: bool(row["status"] == "cancelled")),
        ("was paid in time, by its notice", history.noticed, kept),
        ("was paid in time, at the provider", history.captured, kept),
        ("was charged after its end", history.charged_late, refunded_once),
    ]
    return [
        f"order {order_id} {promise} and is {by_id.get(order_id, 'missing')}"
        for promise, order_ids, holds in promises
        for order_id in sorted(order_ids)
        if order_id not in by_id or not holds(by_id[order_id])
    ]


async def _answers_changed(client: Client, history: History) -> list[str]:
    """Ask every acknowledged wish again: the answer must be the same, byte for byte."""

    async def again(key: str, body: bytes) -> list[str]:
        answer = await place(client, history.asked[key])
        if answer is None or answer.status != 201:
            return [f"{key} was placed; asked again it gives {answer}"]
        return [] if answer.body == body else [f"{key} gives another answer: {answer.body!r}, it was {body!r}"]

    found: list[str] = []
    waiting = iter(history.placed.items())

    async def lane() -> None:
        for key, body in waiting:
            found.extend(await again(key, body))

    await asyncio.gather(*(lane() for _ in range(READERS_AT_ONCE)))
    return found
