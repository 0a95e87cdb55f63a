"""The border to the drivers: every foreign database error becomes one of ours, with the cause kept."""

from __future__ import annotations

import sqlite3
from typing import ClassVar

from sqlalchemy import exc

from holdfast.errors import Conflict, HoldfastError, OutcomeUnknown, Unavailable


class ConstraintFailed(HoldfastError):
    """A CHECK, NOT NULL or foreign key of the database refused the write; the transaction is void."""

    code: ClassVar[str] = "constraint_failed"


class KeyTaken(Conflict):
    """A unique key is taken; another writer came first, or the request can never succeed."""

    code: ClassVar[str] = "key_taken"


# PostgreSQL SQLSTATE, appendix A of its manual.
_SERIALIZATION = {"40001", "40P01"}
_UNIQUE = "23505"
_INTEGRITY_CLASS = "23"
# connection exception, insufficient resources, operator intervention, lock not available, system error (I/O)
_AWAY_CLASSES = ("08", "53", "57", "58")
_AWAY_CODES = {"55P03", "25006"}

_DRIVERS = ("asyncpg.", "psycopg")
# asyncpg's for a connection that is closed, or on which the server said goodbye and has not hung up yet.
_AWAY_CLIENT = ("InterfaceError", "InternalClientError")

_SQLITE_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_PROTOCOL,
}
_SQLITE_UNIQUE = {sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY}


def translate(error: Exception) -> Exception:
    """Return our error for a driver's raised before COMMIT was sent; an error that is no driver's comes back as is."""
    if isinstance(error, HoldfastError):
        return error
    if isinstance(error, (exc.TimeoutError, TimeoutError)):
        return _caused(Unavailable("the database did not answer in time; nothing was changed"), error)
    if isinstance(error, OSError):
        return _caused(Unavailable("the database cannot be reached"), error)
    if isinstance(error, exc.DBAPIError):
        return _caused(_from_driver(error, error.orig, error.connection_invalidated), error)
    if isinstance(error, sqlite3.Error) or type(error).__module__.startswith(_DRIVERS):
        return _caused(_from_driver(error, error, False), error)
    return error


def translate_commit(error: Exception) -> Exception:
    """Return our error for one raised by COMMIT: unless the database clearly refused, nobody knows the outcome."""
    ours = translate(error)
    if isinstance(ours, Unavailable):
        return _caused(OutcomeUnknown("the reply to COMMIT was lost; the change may or may not have happened"), error)
    return ours


def _from_driver(error: Exception, origin: BaseException | None, cut: bool) -> Exception:
    """Classify by the database's code; `origin` is the driver's error, `cut` says that its connection is gone."""
    sqlstate = getattr(origin, "sqlstate", None) or getattr(origin, "pgcode", None) or ""
    sqlite_code = getattr(origin, "sqlite_errorcode", None) or 0
    if sqlstate in _SERIALIZATION:
        return Conflict("lost a race with another transaction")
    if sqlstate == _UNIQUE or sqlite_code in _SQLITE_UNIQUE:
        return KeyTaken(f"a unique key is taken: {_first_line(origin)}")
    if sqlstate.startswith(_INTEGRITY_CLASS) or sqlite_code & 0xFF == sqlite3.SQLITE_CONSTRAINT:
        return ConstraintFailed(_first_line(origin))
    if (
        cut
        or sqlstate in _AWAY_CODES
        or sqlstate.startswith(_AWAY_CLASSES)
        or sqlite_code & 0xFF in _SQLITE_AWAY
        or type(origin).__name__.endswith(_AWAY_CLIENT)
        or isinstance(origin, (OSError, TimeoutError))
    ):
        # The server's own word may be told; a driver's names addresses and the like.
        known = sqlstate or sqlite_code
        return Unavailable(f"the database is away: {_first_line(origin)}" if known else "the database is away")
    return error


def _first_line(error: BaseException | None) -> str:
    # Only the message: the statement's parameters may hold a buyer's data.
    return str(error).partition("\n")[0][:300]


def _caused(ours: Exception, cause: Exception) -> Exception:
    """Keep the cause, unless it quotes the whole row that a constraint refused: that may be a buyer's data."""
    sqlstate = getattr(getattr(cause, "orig", cause), "sqlstate", None) or ""
    if ours is not cause and (sqlstate == _UNIQUE or not sqlstate.startswith(_INTEGRITY_CLASS)):
        ours.__cause__ = cause
    return ours
