"""Exchanges, queues and bindings in tables: declare them, and find the queues of a message."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from holdfast.db.database import Tx
from holdfast.db.sql import insert
from holdfast.errors import PublishRejected, TopologyMismatch
from holdfast.messaging.message import Message
from holdfast.messaging.tables import bindings, exchanges, queues
from holdfast.messaging.topology import ExchangeKind, Topology, route

DEFAULT_EXCHANGE = ""


async def declare(tx: Tx, topology: Topology) -> None:
    """Make the topology exist; raises `TopologyMismatch` when an exchange exists with another kind."""
    wanted = {exchange.name: exchange.kind for exchange in topology.exchanges}
    if wanted:
        rows = [{"name": name, "kind": kind} for name, kind in sorted(wanted.items())]
        await tx.execute(insert(tx, exchanges).on_conflict_do_nothing(), rows)
        for row in await tx.execute(select(exchanges.c.name, exchanges.c.kind)):
            if wanted.get(row.name, row.kind) != row.kind:
                raise TopologyMismatch(
                    f"exchange {row.name!r} exists as {row.kind}, declared as {wanted[row.name]}; "
                    "declare it as it is, or remove it first"
                )
    if topology.queues:
        rows = [{"name": name} for name in sorted({queue.name for queue in topology.queues})]
        await tx.execute(insert(tx, queues).on_conflict_do_nothing(), rows)
    if topology.bindings:
        keys = sorted({(each.exchange, each.queue, each.routing_key) for each in topology.bindings})
        rows = [{"exchange": exchange, "queue": queue, "routing_key": key} for exchange, queue, key in keys]
        await tx.execute(insert(tx, bindings).on_conflict_do_nothing(), rows)


async def queues_for(tx: Tx, message: Message) -> Sequence[str]:
    """The queues this message reaches; raises `PublishRejected` when its exchange does not exist."""
    if message.exchange == DEFAULT_EXCHANGE:
        return [message.routing_key] if message.routing_key in await _queue_names(tx) else []
    found = await _exchange(tx, message.exchange)
    if found is None:
        raise PublishRejected(f"there is no exchange {message.exchange!r} (404 NOT_FOUND); declare it first")
    kind, bound = found
    return route(kind, bound, message.routing_key)


async def _queue_names(tx: Tx) -> set[str]:
    key = ("queues",)
    if key not in tx.memo:
        tx.memo[key] = set((await tx.execute(select(queues.c.name))).scalars())
    names: set[str] = tx.memo[key]
    return names


async def _exchange(tx: Tx, name: str) -> tuple[ExchangeKind, list[tuple[str, str]]] | None:
    # Read once per transaction, never kept longer: another process may bind a queue at any moment.
    key = ("exchange", name)
    if key not in tx.memo:
        statement = (
            select(exchanges.c.kind, bindings.c.queue, bindings.c.routing_key)
            .select_from(exchanges.outerjoin(bindings, bindings.c.exchange == exchanges.c.name))
            .where(exchanges.c.name == name)
            .order_by(bindings.c.queue, bindings.c.routing_key)
        )
        rows = (await tx.execute(statement)).all()
        bound = [(row.queue, row.routing_key) for row in rows if row.queue is not None]
        tx.memo[key] = (rows[0].kind, bound) if rows else None
    found: tuple[ExchangeKind, list[tuple[str, str]]] | None = tx.memo[key]
    return found
