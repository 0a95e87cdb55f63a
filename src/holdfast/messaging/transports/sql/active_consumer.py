"""The single active consumer of a queue: one consumer's claim on all its messages, void when it is not renewed."""

from __future__ import annotations

from sqlalchemy import BigInteger, ColumnElement, Executable, bindparam, null, or_, update

from holdfast.db.database import Dialect
from holdfast.db.prepared import Prepared
from holdfast.messaging.tables import queues


def _this() -> ColumnElement[bool]:
    return queues.c.active == bindparam("consumer", type_=BigInteger)


def _activate(_: Dialect) -> Executable:
    free = or_(queues.c.active.is_(None), _this(), queues.c.active_until_us <= bindparam("now_us"))
    return (
        update(queues)
        .where(queues.c.name == bindparam("of_queue"), free)
        .values(active=bindparam("consumer", type_=BigInteger), active_until_us=bindparam("until_us"))
        .returning(queues.c.name)
    )


def _stay(_: Dialect) -> Executable:
    return (
        update(queues)
        .where(queues.c.name == bindparam("of_queue"), _this())
        .values(active_until_us=bindparam("until_us"))
        .returning(queues.c.name)
    )


def _step_down(_: Dialect) -> Executable:
    return (
        update(queues)
        .where(queues.c.name == bindparam("of_queue"), _this())
        .values(active=null(), active_until_us=null())
        .returning(queues.c.name)
    )


ACTIVATE = Prepared(_activate)
"""Become or remain the active consumer; no row says that another one is."""

STAY = Prepared(_stay)
"""Remain the active consumer; changes nothing for one that is not."""

STEP_DOWN = Prepared(_step_down)
"""Leave the place to the next."""
