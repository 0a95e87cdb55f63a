"""Looking into the queues, read-only: how many messages of which kind, how old, and the messages themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import case, func, select

from holdfast.clock import US_PER_S
from holdfast.db.database import Tx
from holdfast.messaging.tables import messages, parked, queues

PEEK_MAX = 1_000


class QueueView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One queue at one instant."""

    queue: str
    ready: int
    unacked: int
    delayed: int
    parked: int
    oldest_s: float  # how long the oldest ready message has been waiting; 0 without one


class Peeked(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A message as it lies in its queue."""

    id: int
    state: str  # ready, unacked or delayed
    message_id: str
    type: str
    exchange: str
    routing_key: str
    attempt: int
    due_us: int
    headers: dict[str, str]
    body: bytes


def _kind(now_us: int) -> Any:
    due = messages.c.due_us <= now_us
    return case((due, "ready"), (messages.c.lease.is_not(None), "unacked"), else_="delayed")


async def overview(tx: Tx, now_us: int) -> list[QueueView]:
    """All queues by name, the empty ones too."""
    kind = _kind(now_us).label("kind")
    oldest = func.min(messages.c.due_us).label("oldest_us")
    grouped = select(messages.c.queue, kind, func.count().label("number"), oldest)
    counts: dict[tuple[str, str], Any] = {}
    for row in await tx.execute(grouped.group_by(messages.c.queue, kind)):
        counts[row.queue, row.kind] = row
    given_up = select(parked.c.queue, func.count().label("number")).where(parked.c.state == "parked")
    kept = {row.queue: row.number for row in await tx.execute(given_up.group_by(parked.c.queue))}
    names = set((await tx.execute(select(queues.c.name))).scalars()) | set(kept) | {queue for queue, _ in counts}

    def count(queue: str, state: str) -> int:
        return int(counts[queue, state].number) if (queue, state) in counts else 0

    return [
        QueueView(
            queue=name,
            ready=count(name, "ready"),
            unacked=count(name, "unacked"),
            delayed=count(name, "delayed"),
            parked=kept.get(name, 0),
            oldest_s=(now_us - counts[name, "ready"].oldest_us) / US_PER_S if (name, "ready") in counts else 0.0,
        )
        for name in sorted(names)
    ]


async def peek(tx: Tx, queue: str, after: int, limit: int, now_us: int) -> Sequence[Peeked]:
    """Messages of a queue with an id above `after`, by id; they stay where they are."""
    found = (
        select(*messages.columns, _kind(now_us).label("state"))
        .where(messages.c.queue == queue, messages.c.id > after)
        .order_by(messages.c.id)
        .limit(min(limit, PEEK_MAX))
    )
    return [
        Peeked(
            id=row.id,
            state=row.state,
            message_id=row.message_id,
            type=row.type,
            exchange=row.exchange,
            routing_key=row.routing_key,
            attempt=row.attempt,
            due_us=row.due_us,
            headers=msgspec.json.decode(row.headers, type=dict[str, str]),
            body=row.body,
        )
        for row in await tx.execute(found)
    ]
