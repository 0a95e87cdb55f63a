"""Feed's tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import BigInteger, Column, Executable, Index, Table, Text, bindparam, delete, func, select, update

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared, among, insert
from holdfast.services.contracts.feed import Happened
from holdfast.services.schema import metadata

FEED = "feed"

events = Table(
    "feed_event",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("type", Text, nullable=False),
    Column("key", Text, nullable=False, unique=True),  # what it is known by: the same fact again is no new event
    Column("owner", Text),
    Column("at_us", BigInteger, nullable=False),
    Column("recorded_us", BigInteger, nullable=False),
    Column("data", Text, nullable=False),
)
Index(
    "ix_feed_event_owner",
    events.c.owner,
    events.c.id,
    sqlite_where=events.c.owner.is_not(None),
    postgresql_where=events.c.owner.is_not(None),
)

# One row. Who writes events updates it first and holds it until his commit, so ids become visible in their order.
counters = Table(
    "feed_counter",
    metadata,
    Column("name", Text, primary_key=True),
    Column("last", BigInteger, nullable=False),  # the highest id given
    Column("removed", BigInteger, nullable=False),  # the highest id removed for its age
)

insert_events = InsertAll(events)


def _advance(dialect: Dialect) -> Executable:
    fresh = insert(dialect, counters).values(name=FEED, last=bindparam("many"), removed=0)
    more = counters.c.last + fresh.excluded.last
    return fresh.on_conflict_do_update(index_elements=["name"], set_={"last": more}).returning(counters.c.last)


_ADVANCE = Prepared(_advance)
_KNOWN = Prepared(lambda dialect: select(events.c.key).where(among(dialect, events.c.key, "keys")))


async def take_ids(tx: Tx, many: int) -> int:
    """The first of so many ids; nobody else gets any before this transaction has ended."""
    (row,) = await _ADVANCE.rows(tx, many=many)
    return int(row.last) - many + 1


async def known(tx: Tx, keys: Collection[str]) -> set[str]:
    """Those of the keys that stand in the feed."""
    return {row.key for row in await _KNOWN.rows(tx, keys=sorted(keys))}


async def bounds(tx: Tx) -> tuple[int, int]:
    """(the highest id given, the highest id removed)."""
    found = (await tx.execute(select(counters.c.last, counters.c.removed))).first()
    return (found.last, found.removed) if found else (0, 0)


async def page(tx: Tx, after: int, limit: int, types: Sequence[str], owner: str | None) -> list[Happened]:
    """Events after an id, in order; of some types if any are given, of one owner if he is."""
    statement = select(events.c.id, events.c.type, events.c.owner, events.c.at_us, events.c.data)
    statement = statement.where(events.c.id > after)
    if types:
        statement = statement.where(events.c.type.in_(types))
    if owner is not None:
        statement = statement.where(events.c.owner == owner)
    found: Any = await tx.execute(statement.order_by(events.c.id).limit(limit))
    return [Happened(**row._asdict()) for row in found]


async def remove(tx: Tx, before_us: int, limit: int) -> int:
    """Remove the oldest events recorded before an instant, so many at most; answers how many."""
    last, removed = await bounds(tx)
    kept = select(events.c.id).where(events.c.recorded_us >= before_us).order_by(events.c.id).limit(1)
    first_kept = (await tx.execute(kept)).scalar() or last + 1
    old = select(events.c.id).where(events.c.id < first_kept).order_by(events.c.id).limit(limit).subquery()
    upto = (await tx.execute(select(func.max(old.c.id)))).scalar()
    if upto is None:
        return 0
    gone = await tx.execute(delete(events).where(events.c.id <= upto))
    await tx.execute(update(counters).where(counters.c.name == FEED).values(removed=max(upto, removed)))
    return int(gone.rowcount)
