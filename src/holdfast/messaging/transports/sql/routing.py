"""Exchanges, queues and bindings in tables: declare them, and find the queues of a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import msgspec
from sqlalchemy import literal_column, select, union_all

from holdfast.db.database import Tx
from holdfast.db.prepared import Prepared, insert
from holdfast.errors import PublishRejected, TopologyMismatch
from holdfast.messaging.message import Message
from holdfast.messaging.tables import bindings, exchanges, queues
from holdfast.messaging.topology import ExchangeKind, Topology, route

DEFAULT_EXCHANGE = ""


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    """All declarations, as one transaction sees them."""

    kinds: Mapping[str, ExchangeKind]
    bindings: Mapping[str, Sequence[tuple[str, str]]]  # exchange -> (queue, routing key)
    queues: Set[str]


_EVERYTHING = Prepared(
    lambda _: union_all(
        select(
            literal_column("'exchange'").label("what"),
            exchanges.c.name,
            literal_column("''").label("queue"),
            exchanges.c.kind.label("detail"),
        ),
        select(literal_column("'queue'"), queues.c.name, literal_column("''"), literal_column("''")),
        select(literal_column("'binding'"), bindings.c.exchange, bindings.c.queue, bindings.c.routing_key),
    )
)


async def declare(tx: Tx, topology: Topology) -> None:
    """Make the topology exist; raises `TopologyMismatch` when an exchange exists with another kind."""
    wanted = {exchange.name: exchange.kind for exchange in topology.exchanges}
    if wanted:
        rows = [{"name": name, "kind": kind} for name, kind in sorted(wanted.items())]
        await tx.execute(insert(tx.dialect, exchanges).on_conflict_do_nothing(), rows)
        for row in await tx.execute(select(exchanges.c.name, exchanges.c.kind)):
            if wanted.get(row.name, row.kind) != row.kind:
                raise TopologyMismatch(
                    f"exchange {row.name!r} exists as {row.kind}, declared as {wanted[row.name]}; "
                    "declare it as it is, or remove it first"
                )
    if topology.queues:
        rows = [{"name": name} for name in sorted({queue.name for queue in topology.queues})]
        await tx.execute(insert(tx.dialect, queues).on_conflict_do_nothing(), rows)
    if topology.bindings:
        keys = sorted({(each.exchange, each.queue, each.routing_key) for each in topology.bindings})
        rows = [{"exchange": exchange, "queue": queue, "routing_key": key} for exchange, queue, key in keys]
        await tx.execute(insert(tx.dialect, bindings).on_conflict_do_nothing(), rows)


async def queues_for(tx: Tx, message: Message) -> Sequence[str]:
    """The queues this message reaches; raises `PublishRejected` when its exchange does not exist."""
    key = ("route", message.exchange, message.routing_key)
    if key not in tx.memo:
        tx.memo[key] = _route(await _topology(tx), message.exchange, message.routing_key)
    reached: Sequence[str] = tx.memo[key]
    return reached


def _route(known: _Known, exchange: str, routing_key: str) -> list[str]:
    if exchange == DEFAULT_EXCHANGE:
        return [routing_key] if routing_key in known.queues else []
    if exchange not in known.kinds:
        raise PublishRejected(f"there is no exchange {exchange!r} (404 NOT_FOUND); declare it first")
    return route(known.kinds[exchange], known.bindings.get(exchange, ()), routing_key)


async def _topology(tx: Tx) -> _Known:
    # Read once per transaction, never kept longer: another process may bind a queue at any moment.
    if "topology" not in tx.memo:
        kinds: dict[str, ExchangeKind] = {}
        bound: dict[str, list[tuple[str, str]]] = {}
        names: set[str] = set()
        for row in await _EVERYTHING.rows(tx):
            match row.what:
                case "exchange":
                    kinds[row.name] = row.detail
                case "queue":
                    names.add(row.name)
                case "binding":
                    bound.setdefault(row.name, []).append((row.queue, row.detail))
        tx.memo["topology"] = _Known(kinds=kinds, bindings=bound, queues=names)
    known: _Known = tx.memo["topology"]
    return known
