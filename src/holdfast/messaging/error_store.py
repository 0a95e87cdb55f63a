"""ErrorStore: messages that were given up on, for a human to look at, to mend, to send again or to drop.

    parked --replay--> pending --acked--> done
      | ^                 |
      | +--failed again---+     loops + 1, the same row
      +--discard--> discarded

A replay writes a new message with the same message id straight into the queue it failed in: other queues of its
exchange had their copy. An effect that has happened already is therefore dropped by the inbox, and one that has not
happens once. Every action stands in the audit, in the same commit. Between two operators the row decides: the second
one is told, and there is one message.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Text,
    bindparam,
    case,
    func,
    insert,
    literal,
    null,
    select,
    update,
)

from holdfast.clock import Clock
from holdfast.db.database import Database, Tx
from holdfast.errors import Conflict, InvalidInput
from holdfast.ids import IdSource
from holdfast.messaging import operator_input
from holdfast.messaging.compression import CONTENT_ENCODING
from holdfast.messaging.message import HEADER_PARKED_ID
from holdfast.messaging.operator_input import Chosen, check_id
from holdfast.messaging.parked import (
    OPEN,
    STATES,
    AuditEntry,
    FailureGroup,
    Outcome,
    ParkedMessage,
    ParkedSummary,
    State,
)
from holdfast.messaging.tables import messages, parked, parked_audit, queues

LIST_MAX = 1_000
CHUNK = 500  # messages moved by one transaction
MACHINE = "holdfast"

Tell = Callable[[set[tuple[str, int]]], None]
Act = Callable[[Tx, Sequence[Row[Any]], int], Awaitable[None]]
"""Moves locked rows; the number says how many were moved before."""

_ENTRY = [
    parked.c.group_key.label("group") if name == "group" else parked.c[name] for name in ParkedSummary.__struct_fields__
]
_CARRIED = ("queue", "message_id", "exchange", "routing_key", "type", "content_type", "body", "published_us")
_SEND = insert(messages).from_select(
    ["id", "due_us", "ready_us", "headers", "attempt", "deliveries", "crashes", *_CARRIED],
    select(
        bindparam("new_id", type_=BigInteger),
        bindparam("at_us", type_=BigInteger),
        bindparam("at_us", type_=BigInteger),
        bindparam("with_headers", type_=Text),
        literal(1),
        literal(0),
        literal(0),
        *(parked.c[name] for name in _CARRIED),
    ).where(parked.c.id == bindparam("of_id", type_=BigInteger)),
)
_PENDING = (
    update(parked)
    .where(parked.c.id == bindparam("of_id", type_=BigInteger))
    .values(state="pending", replay_id=bindparam("new_id", type_=BigInteger))
)
_RECLAIM = (
    update(parked)
    .where(
        parked.c.id == bindparam("of_id", type_=BigInteger),
        parked.c.replay_id == bindparam("lost_id", type_=BigInteger),
    )
    .values(state="parked", replay_id=null())
)


class ErrorStore:
    """The messages in `hf_parked`; `tell` wakes who waits for a queue, polling is the guard without it."""

    def __init__(self, database: Database, clock: Clock, ids: IdSource, *, tell: Tell | None = None) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids
        self._tell = tell or (lambda _: None)

    async def groups(self, queue: str | None = None) -> Sequence[FailureGroup]:
        """Open messages by queue, exception and stack; the largest group first."""
        operator_input.check_filter(queue, None)
        grouped = (
            select(
                parked.c.group_key,
                parked.c.queue,
                func.sum(case((parked.c.state == "parked", 1), else_=0)).label("parked"),
                func.sum(case((parked.c.state == "pending", 1), else_=0)).label("pending"),
                func.max(parked.c.loops).label("loops_max"),
                func.min(parked.c.parked_us).label("first_us"),
                func.max(parked.c.failed_us).label("last_us"),
                func.max(parked.c.id).label("sample_id"),
            )
            .where(parked.c.state.in_(OPEN), *_within(queue, None))
            .group_by(parked.c.group_key, parked.c.queue)
            .subquery()
        )
        counts = [grouped.c[name] for name in ("parked", "pending", "loops_max", "first_us", "last_us")]
        statement = select(
            grouped.c.group_key.label("group"),
            grouped.c.queue,
            *counts,
            parked.c.error,
            parked.c.type,
            parked.c.reason,
        ).join_from(grouped, parked, parked.c.id == grouped.c.sample_id)
        async with self._database.read() as tx:
            rows = (await tx.execute(statement)).all()
        found = [FailureGroup(**row._mapping) for row in rows]
        return sorted(found, key=lambda each: (-each.count, each.queue, each.group))

    async def list(
        self,
        queue: str | None = None,
        group: str | None = None,
        *,
        states: Sequence[State] = OPEN,
        limit: int = 50,
        after: int = 0,
    ) -> Sequence[ParkedSummary]:
        """Messages in order of their ids, from the one behind `after`; done and discarded ones only when asked for."""
        if not 1 <= limit <= LIST_MAX:
            raise InvalidInput(f"limit must be in 1..{LIST_MAX}, not {limit}; page on with after=<the last id>")
        if odd := set(states) - set(STATES):
            raise InvalidInput(f"there is no state {min(odd)[:80]!r}; known: {', '.join(STATES)}")
        check_id(after)
        operator_input.check_filter(queue, group)
        wanted = [parked.c.id > after, parked.c.state.in_(states), *_within(queue, group)]
        statement = select(*_ENTRY).where(*wanted).order_by(parked.c.id).limit(limit)
        async with self._database.read() as tx:
            rows = (await tx.execute(statement)).all()
        return [ParkedSummary(**row._mapping) for row in rows]

    async def show(self, parked_id: int) -> ParkedMessage:
        """Everything about one message, with what was done to it; raises `InvalidInput` when there is none."""
        check_id(parked_id)
        statement = select(*_ENTRY, parked.c.headers, parked.c.body).where(parked.c.id == parked_id)
        entries = select(parked_audit).where(parked_audit.c.parked_id == parked_id).order_by(parked_audit.c.id)
        async with self._database.read(snapshot=True) as tx:
            row = (await tx.execute(statement)).first()
            if row is None:
                raise _unknown([parked_id])
            audit = tuple(_audit_entry(each) for each in await tx.execute(entries))
        return ParkedMessage(**{**row._mapping, "headers": _headers(row.headers)}, audit=audit)

    async def edit(
        self,
        parked_id: int,
        *,
        actor: str,
        body: bytes | None = None,
        headers: Mapping[str, str | None] | None = None,
        reason: str = "",
    ) -> None:
        """Change the body, or some headers (None removes one), of a parked message; the audit keeps what was before.

        Raises `InvalidInput` for an unknown message, a body or header that cannot be, or when nothing is to be
        changed; `Conflict` when the message is not parked any more. The text of an error never repeats the body.
        """
        check_id(parked_id)
        entry: dict[str, Any] = {"action": "edit", "parked_id": parked_id, **operator_input.check_who(actor, reason)}
        if body is None and not headers:
            raise InvalidInput("an edit needs a body or headers to change")
        async with self._database.transaction() as tx:
            await self._reclaim(tx)
            old_body = (null() if body is None else parked.c.body).label("old_body")
            statement = select(parked.c.state, parked.c.content_type, parked.c.headers, old_body)
            row = (await tx.execute(statement.where(parked.c.id == parked_id).with_for_update())).first()
            if row is None:
                raise _unknown([parked_id])
            if row.state != "parked":
                raise Conflict(f"message {parked_id} is {row.state}; only a parked one can be edited")
            changes: dict[str, Any] = {}
            after = operator_input.edited_headers(_headers(row.headers), headers or {})
            if body is not None:
                operator_input.check_body(body, row.content_type, after.get(CONTENT_ENCODING))
                changes["body"] = body
                entry |= {"body_before": row.old_body, "body_after": body}
            if headers:
                changes["headers"] = msgspec.json.encode(after).decode()
                entry |= {"headers_before": row.headers, "headers_after": changes["headers"]}
            await tx.execute(update(parked).where(parked.c.id == parked_id).values(**changes))
            await self._note(tx, [entry])

    async def replay(
        self,
        ids: Sequence[int] | None = None,
        *,
        group: str | None = None,
        queue: str | None = None,
        everything: bool = False,
        actor: str,
        per_second: float | None = None,
        reason: str = "",
    ) -> Outcome:
        """Put parked messages back into their queues: by id, a group, a queue, or everything that is parked.

        `per_second` spreads the instants at which they are due, from now on. Answers once all are stored; many are
        moved by several transactions, so an error in between leaves the first ones replayed (and asking again is safe).
        Raises `InvalidInput` before anything is changed.
        """
        chosen = operator_input.choose(ids, group, queue, everything)
        entry = {"action": "replay", **operator_input.check_who(actor, reason)}
        step_us = operator_input.step_us(per_second)
        await self._refuse_gone(chosen)
        start_us = self._clock.now_us()

        async def act(tx: Tx, rows: Sequence[Row[Any]], before: int) -> None:
            moves = [
                {
                    "of_id": row.id,
                    "new_id": self._ids.next(),
                    "at_us": start_us + math.ceil((before + place) * step_us),
                    "with_headers": _marked(row),
                }
                for place, row in enumerate(rows)
            ]
            await tx.execute(_SEND, moves)
            await tx.execute(_PENDING, [{name: move[name] for name in ("of_id", "new_id")} for move in moves])
            await self._note(tx, [{**entry, "parked_id": row.id} for row in rows])
            dues: dict[str, int] = {}
            for row, move in zip(rows, moves, strict=True):
                dues.setdefault(row.queue, move["at_us"])  # the earliest; whoever takes it finds the next
            tx.on_commit(partial(self._tell, set(dues.items())))

        return await self._in_chunks(chosen, act)

    async def discard(
        self,
        ids: Sequence[int] | None = None,
        *,
        group: str | None = None,
        queue: str | None = None,
        everything: bool = False,
        actor: str,
        reason: str,
    ) -> Outcome:
        """Give parked messages up for good, with a reason; the rows stay and can be shown. Raises as `replay` does."""
        chosen = operator_input.choose(ids, group, queue, everything)
        entry = {"action": "discard", **operator_input.check_who(actor, reason, must_say_why=True)}

        async def act(tx: Tx, rows: Sequence[Row[Any]], _: int) -> None:
            given_up = parked.c.id.in_([row.id for row in rows])
            await tx.execute(update(parked).where(given_up).values(state="discarded"))
            await self._note(tx, [{**entry, "parked_id": row.id} for row in rows])

        return await self._in_chunks(chosen, act)

    async def _in_chunks(self, chosen: Chosen, act: Act) -> Outcome:
        """Lock what is chosen and parked, some at a time in order of their ids, and move it."""
        if chosen.ids is not None:
            await self._refuse_unknown(chosen.ids)
        moved: list[int] = []
        # A second operator waits here for the first one's rows, and finds that they are parked no more.
        statement = (
            select(parked.c.id, parked.c.queue, parked.c.headers)
            .where(parked.c.id > bindparam("behind"), parked.c.state == "parked", *_meant(chosen))
            .order_by(parked.c.id)
            .limit(CHUNK)
            .with_for_update()
        )
        behind = 0
        while True:
            async with self._database.transaction() as tx:
                if not behind:
                    await self._reclaim(tx)
                rows = (await tx.execute(statement, {"behind": behind})).all()
                if rows:
                    await act(tx, rows, len(moved))
            if not rows:
                break
            moved += [row.id for row in rows]
            behind = rows[-1].id
        left = set(chosen.ids or ()) - set(moved)
        return Outcome(ids=tuple(moved), left=await self._states(left) if left else {})

    async def _reclaim(self, tx: Tx) -> None:
        """Park again what is pending although its message is gone from the queue, by whatever way: it was not acked.

        Looked up first and then changed under the same `replay_id`: that id is never used again, so once gone its
        message stays gone, while the row may have been replayed anew meanwhile.
        """
        alive = select(messages.c.id).where(messages.c.id == parked.c.replay_id).exists()
        lost = select(parked.c.id, parked.c.replay_id).where(parked.c.state == "pending", ~alive)
        for row in (await tx.execute(lost.order_by(parked.c.id))).all():
            again = await tx.execute(_RECLAIM, {"of_id": row.id, "lost_id": row.replay_id})
            if again.rowcount:
                why = "its replay has left the queue without an answer"
                await self._note(tx, [{"actor": MACHINE, "action": "reclaim", "parked_id": row.id, "reason": why}])

    async def _refuse_unknown(self, ids: Sequence[int]) -> None:
        if unknown := sorted(set(ids) - set(await self._states(ids))):
            raise _unknown(unknown)

    async def _refuse_gone(self, chosen: Chosen) -> None:
        """A message in a queue that does not exist would wait for nobody."""
        known = select(queues.c.name).where(queues.c.name == parked.c.queue).exists()
        lost = select(parked.c.queue).where(parked.c.state == "parked", ~known, *_meant(chosen)).limit(1)
        async with self._database.read() as tx:
            if gone := (await tx.execute(lost)).scalar_one_or_none():
                raise InvalidInput(
                    f"queue {gone[:100]!r} does not exist any more; declare it again, or discard what was parked in it"
                )

    async def _states(self, ids: Sequence[int] | set[int]) -> dict[int, State]:
        statement = select(parked.c.id, parked.c.state).where(parked.c.id.in_(ids)).order_by(parked.c.id)
        async with self._database.read() as tx:
            return {row.id: row.state for row in await tx.execute(statement)}

    async def _note(self, tx: Tx, entries: Sequence[Mapping[str, Any]]) -> None:
        now_us = self._clock.now_us()
        await tx.execute(
            insert(parked_audit), [{**entry, "id": self._ids.next(), "at_us": now_us} for entry in entries]
        )


def _meant(chosen: Chosen) -> Sequence[ColumnElement[bool]]:
    if chosen.ids is not None:
        return [parked.c.id.in_(chosen.ids)]
    return _within(chosen.queue, chosen.group)


def _within(queue: str | None, group: str | None) -> Sequence[ColumnElement[bool]]:
    filters = ((parked.c.queue, queue), (parked.c.group_key, group))
    return [column == wanted for column, wanted in filters if wanted is not None]


def _marked(row: Row[Any]) -> str:
    """The message's headers with the mark by which its ack or reject finds the row again."""
    return msgspec.json.encode({**_headers(row.headers), HEADER_PARKED_ID: str(row.id)}).decode()


def _audit_entry(row: Row[Any]) -> AuditEntry:
    return AuditEntry(
        at_us=row.at_us,
        actor=row.actor,
        action=row.action,
        reason=row.reason,
        headers_before=None if row.headers_before is None else _headers(row.headers_before),
        headers_after=None if row.headers_after is None else _headers(row.headers_after),
        body_before=row.body_before,
        body_after=row.body_after,
    )


def _headers(stored: str) -> dict[str, str]:
    return msgspec.json.decode(stored, type=dict[str, str])


def _unknown(ids: Sequence[int]) -> InvalidInput:
    more = f" and {len(ids) - 1} more of these" if len(ids) > 1 else ""
    return InvalidInput(f"there is no parked message {ids[0]}{more}; `holdfast errors list` shows them")
