"""Webhooks' tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Executable,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    delete,
    func,
    or_,
    select,
    update,
)

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared
from holdfast.services.schema import metadata
from holdfast.services.webhooks.model import DONE, FAILED, PENDING, STATUSES, Answer, Delivery, Endpoint
from holdfast.settings import Secret

_STATES = ", ".join(f"'{status}'" for status in STATUSES)

endpoints = Table(
    "webhook_endpoint",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("url", Text, nullable=False, unique=True),
    Column("description", Text, nullable=False),
    Column("types", Text, nullable=False),  # JSON
    Column("enabled", Integer, nullable=False),
    Column("disabled_reason", Text),
    Column("secret", Text, nullable=False),
    Column("previous_secret", Text),
    Column("previous_until_us", BigInteger),
    Column("failing_since_us", BigInteger),  # the first failure after the last success
    Column("flagged_us", BigInteger),
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("enabled IN (0, 1)", name="enabled"),
)

deliveries = Table(
    "webhook_delivery",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("endpoint_id", BigInteger, nullable=False),
    Column("event_id", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # of its own, so that the feed may forget the event before
    Column("status", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("round_start", Integer, nullable=False),
    Column("due_us", BigInteger, nullable=False),  # while pending; one that is being sent is due when its time is over
    Column("last_status", Integer),
    Column("last_error", Text),
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    UniqueConstraint("endpoint_id", "event_id", name="uq_webhook_delivery_endpoint_id_event_id"),
    CheckConstraint(f"status IN ({_STATES})", name="status"),
)
Index(
    "ix_webhook_delivery_due",
    deliveries.c.endpoint_id,
    deliveries.c.due_us,
    sqlite_where=deliveries.c.status == PENDING,
    postgresql_where=deliveries.c.status == PENDING,
)

attempts = Table(
    "webhook_attempt",
    metadata,
    Column("delivery_id", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("answer", Text, nullable=False),
    Column("took_ms", BigInteger, nullable=False),
)

insert_deliveries = InsertAll(deliveries)
insert_attempts = InsertAll(attempts)

_DELIVERY = [deliveries.c[name] for name in Delivery.__struct_fields__]


def _claim(_: Dialect) -> Executable:
    due = (
        select(deliveries.c.id)
        .where(
            deliveries.c.endpoint_id == bindparam("of_endpoint"),
            deliveries.c.status == PENDING,
            deliveries.c.due_us <= bindparam("now_us"),
        )
        .order_by(deliveries.c.due_us, deliveries.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = update(deliveries).where(deliveries.c.id == due, deliveries.c.status == PENDING)
    return claimed.values(attempts=deliveries.c.attempts + 1, due_us=bindparam("until_us")).returning(*_DELIVERY)


_CLAIM = Prepared(_claim)
_ENDPOINTS = Prepared(lambda _: select(endpoints).order_by(endpoints.c.id))
_ENDPOINT = Prepared(lambda _: select(endpoints).where(endpoints.c.id == bindparam("endpoint_id")))


async def all_endpoints(tx: Tx) -> list[Endpoint]:
    """Every endpoint, oldest first."""
    return [_endpoint(row) for row in await _ENDPOINTS.rows(tx)]


async def endpoint(tx: Tx, endpoint_id: int) -> Endpoint | None:
    """One endpoint."""
    rows = await _ENDPOINT.rows(tx, endpoint_id=endpoint_id)
    return _endpoint(rows[0]) if rows else None


async def lock_endpoint(tx: Tx, endpoint_id: int) -> Endpoint | None:
    """One endpoint, which nobody else changes before this transaction has ended."""
    row = (await tx.execute(select(endpoints).where(endpoints.c.id == endpoint_id).with_for_update())).first()
    return _endpoint(row) if row else None


async def insert_endpoint(tx: Tx, new: Endpoint) -> None:
    """Write an endpoint."""
    await tx.execute(endpoints.insert().values(**_row(new)))


async def update_endpoint(tx: Tx, changed: Endpoint) -> None:
    """Write what became of an endpoint that is locked."""
    await tx.execute(update(endpoints).where(endpoints.c.id == changed.id).values(**_row(changed)))


async def delete_endpoint(tx: Tx, endpoint_id: int) -> bool:
    """Remove an endpoint; says if there was one."""
    return (await tx.execute(delete(endpoints).where(endpoints.c.id == endpoint_id))).rowcount > 0


async def claim(tx: Tx, endpoint_id: int, now_us: int, until_us: int) -> Delivery | None:
    """Take the delivery to an endpoint that has been due the longest; it is due again at `until_us`."""
    rows = await _CLAIM.rows(tx, of_endpoint=endpoint_id, now_us=now_us, until_us=until_us)
    return Delivery(**rows[0]._asdict()) if rows else None


async def settle(tx: Tx, tried: Delivery, status: str, due_us: int, answer: Answer, now_us: int) -> bool:
    """Write what became of an attempt; False when a later one, a replay or a removal has overtaken it."""
    mine = and_(deliveries.c.id == tried.id, deliveries.c.attempts == tried.attempts, deliveries.c.status == PENDING)
    settled = update(deliveries).where(mine, deliveries.c.round_start == tried.round_start)
    values: dict[str, Any] = {"last_status": answer.status, "last_error": answer.error}
    return (await tx.execute(settled.values(status=status, due_us=due_us, changed_us=now_us, **values))).rowcount > 0


async def cancel_pending(tx: Tx, endpoint_id: int, status: str, now_us: int) -> None:
    """Give up what is on its way to an endpoint."""
    pending = and_(deliveries.c.endpoint_id == endpoint_id, deliveries.c.status == PENDING)
    ours = select(deliveries.c.id).where(pending).order_by(deliveries.c.id).with_for_update().cte("ours")
    given_up = update(deliveries).where(deliveries.c.id.in_(select(ours.c.id)))
    await tx.execute(given_up.values(status=status, changed_us=now_us))


async def restart(
    tx: Tx, endpoint_id: int, now_us: int, *, delivery_id: int | None = None, failed_since_us: int = 0
) -> int:
    """Let one delivery that is settled, or all that failed since an instant, begin anew; answers how many."""
    chosen = and_(deliveries.c.endpoint_id == endpoint_id, deliveries.c.status.in_([DONE, FAILED]))
    if delivery_id is not None:
        chosen = and_(chosen, deliveries.c.id == delivery_id)
    else:
        chosen = and_(chosen, deliveries.c.status == FAILED, deliveries.c.changed_us >= failed_since_us)
    ours = select(deliveries.c.id).where(chosen).order_by(deliveries.c.id).with_for_update().cte("ours")
    again = update(deliveries).where(deliveries.c.id.in_(select(ours.c.id)))
    anew = again.values(status=PENDING, round_start=deliveries.c.attempts, due_us=now_us, changed_us=now_us)
    return len((await tx.execute(anew.returning(deliveries.c.id))).all())


async def overdue(tx: Tx, before_us: int) -> Sequence[int]:
    """The endpoints that have deliveries due since before an instant."""
    waiting = select(deliveries.c.endpoint_id).where(deliveries.c.status == PENDING, deliveries.c.due_us < before_us)
    found = select(endpoints.c.id).where(endpoints.c.enabled == 1, endpoints.c.id.in_(waiting))
    return (await tx.execute(found.order_by(endpoints.c.id))).scalars().all()


async def delivery(tx: Tx, endpoint_id: int, delivery_id: int) -> Any | None:
    """The row of one delivery to an endpoint."""
    mine = and_(deliveries.c.id == delivery_id, deliveries.c.endpoint_id == endpoint_id)
    return (await tx.execute(select(deliveries).where(mine))).first()


async def list_deliveries(tx: Tx, endpoint_id: int, status: str | None, before: int, limit: int) -> Sequence[Any]:
    """Rows of deliveries to an endpoint, the newest first, with ids below `before` if it is not 0."""
    statement = select(deliveries).where(deliveries.c.endpoint_id == endpoint_id)
    if status is not None:
        statement = statement.where(deliveries.c.status == status)
    if before:
        statement = statement.where(deliveries.c.id < before)
    return (await tx.execute(statement.order_by(deliveries.c.id.desc()).limit(limit))).all()


async def log_of(tx: Tx, delivery_id: int) -> Sequence[Any]:
    """Rows of the attempts of a delivery, in order."""
    statement = select(attempts).where(attempts.c.delivery_id == delivery_id).order_by(attempts.c.attempt)
    return (await tx.execute(statement)).all()


async def remove_settled(tx: Tx, before_us: int, limit: int) -> int:
    """Remove deliveries settled before an instant, with their attempts, so many at most; answers how many."""
    orphaned = deliveries.c.endpoint_id.not_in(select(endpoints.c.id))  # written while its endpoint was removed
    old = or_(deliveries.c.status != PENDING, orphaned)
    chosen = select(deliveries.c.id).where(old, deliveries.c.changed_us < before_us).order_by(deliveries.c.id)
    ids: Collection[int] = (await tx.execute(chosen.limit(limit))).scalars().all()
    if ids:
        await tx.execute(delete(attempts).where(attempts.c.delivery_id.in_(ids)))
        await tx.execute(delete(deliveries).where(deliveries.c.id.in_(ids)))
    return len(ids)


async def count_endpoints(tx: Tx) -> int:
    """How many endpoints there are."""
    return int((await tx.execute(select(func.count()).select_from(endpoints))).scalar_one())


def _endpoint(row: Any) -> Endpoint:
    fields: Mapping[str, Any] = row._asdict()
    previous = fields["previous_secret"]
    return Endpoint(
        **dict(fields)
        | {
            "types": msgspec.json.decode(fields["types"], type=tuple[str, ...]),
            "enabled": bool(fields["enabled"]),
            "secret": Secret(fields["secret"]),
            "previous_secret": None if previous is None else Secret(previous),
        }
    )


def _row(endpoint: Endpoint) -> dict[str, Any]:
    previous = endpoint.previous_secret
    return msgspec.structs.asdict(endpoint) | {
        "types": msgspec.json.encode(endpoint.types).decode(),
        "enabled": int(endpoint.enabled),
        "secret": endpoint.secret.reveal(),
        "previous_secret": None if previous is None else previous.reveal(),
    }
