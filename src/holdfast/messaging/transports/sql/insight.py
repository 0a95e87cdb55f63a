"""Looking into the queues, read-only: how many messages of which kind, how old, and the messages themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, case, func, select

from holdfast.clock import US_PER_S
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
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

    @property
    def held(self) -> int:
        """All messages in the queue itself; parked ones have left it."""
        return self.ready + self.unacked + self.delayed


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
    cancel_key: str | None
    headers: dict[str, str]
    body: bytes


def _kind(now_us: int) -> Any:
    due = messages.c.due_us <= now_us
    return case((due, "ready"), (messages.c.lease.is_not(None), "unacked"), else_="delayed")


def counting(now_us: int) -> Select[Any]:
    """Counts of each queue that has messages, in one pass over ix_hf_message_ready, in its order, reading no row."""
    due, held = messages.c.due_us <= now_us, messages.c.lease.is_not(None)
    return select(
        messages.c.queue,
        func.count().label("total"),
        func.count().filter(due).label("ready"),
        func.count().filter(~due, held).label("unacked"),
        func.min(messages.c.due_us).label("first_due_us"),
    ).group_by(messages.c.queue)


async def overview(tx: Tx, now_us: int) -> list[QueueView]:
    """All queues by name, the empty ones too."""
    counts = {row.queue: row for row in await tx.execute(counting(now_us))}
    given_up = select(parked.c.queue, func.count().label("number")).where(parked.c.state == "parked")
    kept = {row.queue: row.number for row in await tx.execute(given_up.group_by(parked.c.queue))}
    names = set((await tx.execute(select(queues.c.name))).scalars()) | set(kept) | set(counts)
    return [_view(name, counts.get(name), kept.get(name, 0), now_us) for name in sorted(names)]


def _view(name: str, row: Any, parked_number: int, now_us: int) -> QueueView:
    if row is None:
        return QueueView(queue=name, ready=0, unacked=0, delayed=0, parked=parked_number, oldest_s=0.0)
    return QueueView(
        queue=name,
        ready=row.ready,
        unacked=row.unacked,
        delayed=row.total - row.ready - row.unacked,
        parked=parked_number,
        oldest_s=(now_us - row.first_due_us) / US_PER_S if row.ready else 0.0,
    )


class Growth(QueueView, frozen=True, kw_only=True, rename="camel"):
    """A queue at the end of an interval, and by how much it grew; what came and went meanwhile leaves no trace."""

    growth_per_s: float  # of ready, unacked and delayed together: what came less what went


def growth(before: Sequence[QueueView], after: Sequence[QueueView], interval_s: float) -> list[Growth]:
    """How the queues changed between two overviews; one that is new grew from nothing."""
    held = {view.queue: view.held for view in before}
    return [
        Growth(**msgspec.structs.asdict(view), growth_per_s=(view.held - held.get(view.queue, 0)) / interval_s)
        for view in after
    ]


async def peek(tx: Tx, queue: str, after: int, limit: int, now_us: int) -> Sequence[Peeked]:
    """Messages of a queue with an id above `after`, by id; they stay where they are."""
    found = (
        select(*messages.columns, _kind(now_us).label("state"))
        .where(messages.c.queue == queue, messages.c.id > after)
        .order_by(messages.c.id)
        .limit(min(limit, PEEK_MAX))
    )
    return await _peeked(tx, found)


async def pending(
    tx: Tx, now_us: int, *, queue: str | None = None, cancel_key: str | None = None, limit: int = 100
) -> Sequence[Peeked]:
    """Messages that are not due yet and nobody holds, the soonest first: of a queue, under a key, or both.

    Raises `InvalidInput` where neither is given: there may be millions.
    """
    if queue is None and cancel_key is None:
        raise InvalidInput("which delayed messages: name a queue, a cancel key, or both")
    found = (
        select(*messages.columns, _kind(now_us).label("state"))
        .where(messages.c.due_us > now_us, messages.c.lease.is_(None))
        .order_by(messages.c.due_us, messages.c.id)
        .limit(min(limit, PEEK_MAX))
    )
    if queue is not None:
        found = found.where(messages.c.queue == queue)
    if cancel_key is not None:
        found = found.where(messages.c.cancel_key == cancel_key)
    return await _peeked(tx, found)


async def _peeked(tx: Tx, found: Select[Any]) -> list[Peeked]:
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
            cancel_key=row.cancel_key,
            headers=msgspec.json.decode(row.headers, type=dict[str, str]),
            body=row.body,
        )
        for row in await tx.execute(found)
    ]
