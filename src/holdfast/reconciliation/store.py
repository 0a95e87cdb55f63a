"""Reconciliation's tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Table, Text, delete, select, update

from holdfast.db.database import Tx
from holdfast.db.prepared import InsertAll, insert
from holdfast.reconciliation.model import LIVE, Difference, State
from holdfast.services.schema import metadata

_STATES = ", ".join(f"'{state}'" for state in State)

differences = Table(
    "reconciliation_difference",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("detail", Text, nullable=False),  # the row that was found, JSON
    Column("repair", Text, nullable=False),  # empty where none can be run
    Column("advice", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("first_seen_us", BigInteger, nullable=False),
    Column("last_seen_us", BigInteger, nullable=False),
    Column("repair_us", BigInteger),  # when its repair was last run
    Column("closed_us", BigInteger),
    CheckConstraint(f"state IN ({_STATES})", name="state"),
)
# Found again, it is the same row as long as it is there.
Index(
    "uq_reconciliation_difference_live",
    differences.c.kind,
    differences.c.subject,
    unique=True,
    sqlite_where=differences.c.state.in_([state.value for state in LIVE]),
    postgresql_where=differences.c.state.in_([state.value for state in LIVE]),
)

# Who compared, repaired or dismissed what, and why.
log = Table(
    "reconciliation_log",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("difference_id", BigInteger),
    Column("action", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)
Index("ix_reconciliation_log_difference_id", log.c.difference_id)

insert_entries = InsertAll(log)


async def live(tx: Tx, kinds: Collection[str], *, lock: bool = False) -> list[Difference]:
    """The differences of these kinds that are still there, in order of id."""
    statement = select(differences).where(
        differences.c.state.in_([state.value for state in LIVE]), differences.c.kind.in_(sorted(kinds))
    )
    statement = statement.order_by(differences.c.id)
    return [_difference(row) for row in await tx.execute(statement.with_for_update() if lock else statement)]


async def add(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> int:
    """Add differences that nobody else added meanwhile; answers how many."""
    added = 0
    for row in rows:
        added += (await tx.execute(insert(tx.dialect, differences).values(**row).on_conflict_do_nothing())).rowcount
    return added


async def change(tx: Tx, difference_id: int, **values: Any) -> None:
    """Change what is known of a difference."""
    await tx.execute(update(differences).where(differences.c.id == difference_id).values(**values))


async def by_id(tx: Tx, difference_id: int, *, lock: bool = False) -> Difference | None:
    """One difference."""
    statement = select(differences).where(differences.c.id == difference_id)
    row = (await tx.execute(statement.with_for_update() if lock else statement)).first()
    return _difference(row) if row else None


async def page(tx: Tx, *, states: Sequence[str], kind: str | None, after: int, limit: int) -> list[Difference]:
    """Differences in order of id, after the given one."""
    statement = select(differences).where(differences.c.id > after, differences.c.state.in_(list(states)))
    if kind is not None:
        statement = statement.where(differences.c.kind == kind)
    return [_difference(row) for row in await tx.execute(statement.order_by(differences.c.id).limit(limit))]


async def last_run(tx: Tx, actor: str) -> int:
    """When this one compared last; 0 for never."""
    statement = select(log.c.at_us).where(log.c.action == "run", log.c.actor == actor)
    return int((await tx.execute(statement.order_by(log.c.id.desc()).limit(1))).scalar() or 0)


async def forget_runs(tx: Tx, actor: str, before_us: int) -> None:
    """Drop the log's lines of comparisons by this one from before an instant."""
    await tx.execute(delete(log).where(log.c.action == "run", log.c.actor == actor, log.c.at_us < before_us))


async def entries(tx: Tx, difference_id: int) -> list[dict[str, Any]]:
    """What was done about a difference, in order."""
    statement = select(log).where(log.c.difference_id == difference_id).order_by(log.c.id)
    return [dict(row._mapping) for row in await tx.execute(statement)]


def text_of(detail: Mapping[str, Any]) -> str:
    """A detail as it is stored."""
    return msgspec.json.encode(detail).decode()


def _difference(row: Any) -> Difference:
    return Difference(**row._mapping)
