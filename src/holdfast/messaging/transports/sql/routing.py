"""Exchanges, queues and bindings in tables: declare them, and find the queues of a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import delete, literal_column, select, union_all, update

from holdfast.db.database import Tx
from holdfast.db.prepared import Prepared, insert
from holdfast.errors import NoSuchExchange, TopologyMismatch
from holdfast.messaging.routing import route
from holdfast.messaging.tables import bindings, exchanges, queues
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology, differences
from holdfast.messaging.topology_plan import Change, plan, surplus

DEFAULT_EXCHANGE = ""
OFFERED = frozenset(
    {
        "alternate_exchange",
        "auto_delete",
        "dead_letter_exchange",
        "exclusive",
        "max_length",
        "message_ttl",
        "queue_expires",
        "single_active_consumer",
    }
)
"""What these tables offer beyond plain exchanges and durable queues; the rest is for a broker."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """All declarations, as one transaction sees them."""

    exchanges: Mapping[str, Exchange]
    bindings: Mapping[str, Sequence[tuple[str, str]]]  # exchange -> (queue, routing key)
    queues: Mapping[str, Queue]

    def route(self, exchange: str, routing_key: str) -> Sequence[Queue]:
        """The queues reached by name, over alternate exchanges too; raises `NoSuchExchange`.

        A database gives bindings in any order: sorted, the copies of a message are written alike everywhere.
        """
        if exchange == DEFAULT_EXCHANGE:
            return [self.queues[routing_key]] if routing_key in self.queues else []
        if exchange not in self.exchanges:
            raise NoSuchExchange(f"there is no exchange {exchange!r} (404 NOT_FOUND); declare it first")
        asked: set[str] = set()
        at: str | None = exchange
        while at is not None and at not in asked and at in self.exchanges:
            asked.add(at)
            reached = route(self.exchanges[at].kind, self.bindings.get(at, ()), routing_key)
            if reached:
                return [self.queues[name] for name in sorted(reached)]
            at = self.exchanges[at].alternate
        return []

    def topology(self) -> Topology:
        """The same as declarations."""
        return Topology(
            exchanges=tuple(self.exchanges.values()),
            queues=tuple(self.queues.values()),
            bindings=tuple(
                Binding(exchange=exchange, queue=queue, routing_key=key)
                for exchange, bound in self.bindings.items()
                for queue, key in bound
            ),
        )


_EVERYTHING = Prepared(
    lambda _: union_all(
        select(
            literal_column("'exchange'").label("what"),
            exchanges.c.name,
            literal_column("''").label("queue"),
            exchanges.c.arguments.label("detail"),
        ),
        select(literal_column("'queue'"), queues.c.name, literal_column("''"), queues.c.arguments),
        select(literal_column("'binding'"), bindings.c.exchange, bindings.c.queue, bindings.c.routing_key),
    )
)


async def declare(tx: Tx, topology: Topology, owner: int, now_us: int) -> None:
    """Make the topology exist; `owner` is who exclusive queues belong to.

    Raises `TopologyMismatch` when something exists with other arguments, or is exclusive to another owner.
    """
    known = await known_to(tx)
    check(known, topology)
    rows: list[dict[str, Any]] = [
        {"name": each.name, "arguments": arguments(each)} for each in _by_name(topology.exchanges)
    ]
    if rows:
        await tx.execute(insert(tx.dialect, exchanges).on_conflict_do_nothing(), rows)
    rows = [
        {
            "name": each.name,
            "arguments": arguments(each),
            "owner": owner if each.exclusive else None,
            "used_us": now_us,
        }
        for each in _by_name(topology.queues)
    ]
    if rows:
        await tx.execute(insert(tx.dialect, queues).on_conflict_do_nothing(), rows)
    await _refuse_foreign(tx, topology, owner)
    for each in topology.queues:
        if each.expires_ms is not None and each.name in known.queues:
            await tx.execute(update(queues).where(queues.c.name == each.name).values(used_us=now_us))
    if topology.bindings:
        keys = sorted({(each.exchange, each.queue, each.routing_key) for each in topology.bindings})
        rows = [{"exchange": exchange, "queue": queue, "routing_key": key} for exchange, queue, key in keys]
        await tx.execute(insert(tx.dialect, bindings).on_conflict_do_nothing(), rows)
    # Another process may have declared the same names meanwhile, with other arguments.
    tx.memo.clear()
    check(await known_to(tx), topology)


async def change(tx: Tx, topology: Topology, now_us: int, *, prune: bool) -> list[Change]:
    """Make the declared topology the wanted one, messages untouched; answers what was changed.

    An argument that changes holds for what is published from now on: messages keep the expiry they were given.
    """
    actual = (await known_to(tx)).topology()
    changes = plan(actual, topology, prune=prune)
    changed = {(each.what, each.name) for each in changes if each.action == "change"}
    for what, table, declared in (("exchange", exchanges, topology.exchanges), ("queue", queues, topology.queues)):
        for each in declared:
            if (what, each.name) in changed:
                await tx.execute(update(table).where(table.c.name == each.name).values(arguments=arguments(each)))
    if prune:
        for binding in surplus(actual, topology):
            await tx.execute(
                delete(bindings).where(
                    bindings.c.exchange == binding.exchange,
                    bindings.c.queue == binding.queue,
                    bindings.c.routing_key == binding.routing_key,
                )
            )
    tx.memo.clear()
    await declare(tx, topology, 0, now_us)
    return changes


def check(known: Known, topology: Topology, *, passive: bool = False) -> None:
    """Raise `TopologyMismatch` naming every argument that differs, both values; `passive`: also what is missing."""
    told = []
    for what, here, wanted in (
        ("exchange", known.exchanges, topology.exchanges),
        ("queue", known.queues, topology.queues),
    ):
        for each in wanted:
            if (exists := here.get(each.name)) is not None:
                told += [
                    f"{what} {each.name!r} exists with {name}={ours!r}, declared with {name}={theirs!r}"
                    for name, ours, theirs in differences(exists, each)
                ]
            elif passive:
                told.append(f"{what} {each.name!r} does not exist")
    if passive:
        told += [
            f"queue {each.queue!r} is not bound to {each.exchange!r} with key {each.routing_key!r}"
            for each in topology.bindings
            if (each.queue, each.routing_key) not in known.bindings.get(each.exchange, ())
        ]
    if told:
        raise TopologyMismatch("; ".join(told) + "; declare it as it is, or see `holdfast queues plan`")


async def known_to(tx: Tx) -> Known:
    """All declarations; read once per transaction, never kept longer: another process may bind at any moment."""
    if "topology" not in tx.memo:
        found: dict[str, Exchange] = {}
        bound: dict[str, list[tuple[str, str]]] = {}
        names: dict[str, Queue] = {}
        for row in await _EVERYTHING.rows(tx):
            match row.what:
                case "exchange":
                    found[row.name] = _exchange(row.name, row.detail)
                case "queue":
                    names[row.name] = _queue(row.name, row.detail)
                case "binding":
                    bound.setdefault(row.name, []).append((row.queue, row.detail))
        tx.memo["topology"] = Known(exchanges=found, bindings=bound, queues=names)
    known: Known = tx.memo["topology"]
    return known


def arguments(declared: Exchange | Queue) -> str:
    """A declaration as it is stored: what differs from the defaults, without the name."""
    plain = type(declared)(name=declared.name)
    pairs = {name: getattr(declared, name) for name, _, _ in differences(plain, declared)}
    return msgspec.json.encode(pairs, order="sorted").decode()


@lru_cache(maxsize=10_000)
def _exchange(name: str, stored: str) -> Exchange:
    return msgspec.convert({"name": name} | msgspec.json.decode(stored), Exchange)


@lru_cache(maxsize=10_000)
def _queue(name: str, stored: str) -> Queue:
    return msgspec.convert({"name": name} | msgspec.json.decode(stored), Queue)


async def _refuse_foreign(tx: Tx, topology: Topology, owner: int) -> None:
    exclusive = [each.name for each in topology.queues if each.exclusive]
    if not exclusive:
        return
    foreign = select(queues.c.name).where(queues.c.name.in_(exclusive), queues.c.owner != owner)
    if taken := (await tx.execute(foreign)).scalars().all():
        raise TopologyMismatch(
            f"queue {taken[0]!r} is exclusive to another instance (405 RESOURCE_LOCKED); use a name of your own"
        )


def _by_name(declared: Sequence[Any]) -> list[Any]:
    return [each for _, each in sorted({each.name: each for each in declared}.items())]
