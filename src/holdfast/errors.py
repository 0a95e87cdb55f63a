"""The base error and the tree; every error of ours has a stable `code` and says whether trying again can help.

    HoldfastError
    ├── InvalidInput            the caller's data is wrong; nothing was changed
    │   ├── NoSuchQueue         a queue that nobody declared
    │   ├── InvalidSettings     a setting is unknown, missing or out of range
    │   └── CannotDecode        a message body does not fit the type its handler asks for
    ├── Refused                 a rule said no; nothing was changed (services add their own below it)
    ├── Conflict                lost a race that is safe to run again from the start
    ├── Unavailable             a part we need is away; what was asked has NOT happened
    │   ├── Overloaded          a bounded queue is full; refused before any write
    │   └── ShuttingDown        this process is draining; refused before any write
    ├── OutcomeUnknown          the reply was lost; what was asked may or may not have happened
    │   └── ReplyTimeout        no reply to a request came in time
    ├── UnsafeDatabase          the database could lose what it acknowledged; we refuse to start
    ├── DatabaseInUse           another process writes this SQLite file
    ├── SchemaOutdated          migrations are missing: run `holdfast migrate`
    ├── HandlerTimeout          a handler took longer than its listener allows
    ├── AlreadySettled          a delivery was settled twice
    ├── TopologyMismatch        an exchange or queue exists with other arguments
    └── PublishError            a message is not known to be stored
        ├── Unroutable          no queue takes this routing key (312 NO_ROUTE in AMQP)
        ├── PublishRejected     known not stored
        │   ├── NoSuchExchange  nobody declared the exchange; trying again cannot help
        │   └── Unstorable      characters that no database stores; trying again cannot help
        └── PublishUnconfirmed  unknown: deadline or lost connection

Foreign errors (drivers, libraries) are translated at the border where they arise, with the cause kept.
"""

from __future__ import annotations

from typing import ClassVar


class HoldfastError(Exception):
    """Root of every error this library raises on purpose."""

    code: ClassVar[str] = "holdfast_error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or (type(self).__doc__ or type(self).__name__).splitlines()[0])

    @property
    def detail(self) -> str:
        """The sentence for a human: what was wrong and what to do."""
        return str(self.args[0])


class InvalidInput(HoldfastError):
    """The given data is wrong; nothing was changed."""

    code = "invalid_input"


class NoSuchQueue(InvalidInput):
    """There is no such queue; declare it first."""

    code = "no_such_queue"


class InvalidSettings(InvalidInput):
    """A setting is unknown, missing or out of range."""

    code = "invalid_settings"


class CannotDecode(InvalidInput):
    """A message body does not fit the type its handler asks for."""

    code = "cannot_decode"


class Refused(HoldfastError):
    """A rule said no; nothing was changed."""

    code = "refused"


class Conflict(HoldfastError):
    """Lost a race with another writer; nothing was changed and running it again is safe."""

    code = "conflict"
    retryable = True


class Unavailable(HoldfastError):
    """A part we need is away; what was asked has not happened."""

    code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """A bounded queue is full; the request was refused before any write."""

    code = "overloaded"


class ShuttingDown(Unavailable):
    """This process is draining; the request was refused before any write."""

    code = "shutting_down"


class OutcomeUnknown(HoldfastError):
    """The reply was lost; what was asked may or may not have happened. Ask again with the same idempotency key."""

    code = "outcome_unknown"
    retryable = True


class ReplyTimeout(OutcomeUnknown):
    """No reply came in time; the request may or may not have been handled."""

    code = "reply_timeout"


class UnsafeDatabase(HoldfastError):
    """The database could lose what it acknowledged; holdfast refuses to start on it."""

    code = "unsafe_database"


class DatabaseInUse(HoldfastError):
    """Another process writes this SQLite file."""

    code = "database_in_use"


class SchemaOutdated(HoldfastError):
    """The database lacks migrations; run `holdfast migrate`."""

    code = "schema_outdated"


class HandlerTimeout(HoldfastError):
    """A handler took longer than its listener allows; it was cancelled."""

    code = "handler_timeout"
    retryable = True


class AlreadySettled(HoldfastError):
    """A delivery is settled exactly once; this one already was."""

    code = "already_settled"


class TopologyMismatch(HoldfastError):
    """An exchange or queue already exists with other arguments."""

    code = "topology_mismatch"


class PublishError(HoldfastError):
    """A message is not known to be stored."""

    code = "publish_error"


class Unroutable(PublishError):
    """No queue takes this routing key; the message was returned (312 NO_ROUTE) and is stored nowhere."""

    code = "unroutable"


class PublishRejected(PublishError):
    """The message is known not to be stored."""

    code = "publish_rejected"
    retryable = True


class Unstorable(PublishRejected):
    """A text of the message holds characters that no database stores; the message is stored nowhere."""

    code = "unstorable"
    retryable = False


class NoSuchExchange(PublishRejected):
    """There is no such exchange; declare it first. The message is stored nowhere."""

    code = "no_such_exchange"
    retryable = False


class PublishUnconfirmed(PublishError):
    """Nobody knows whether the message is stored: the deadline passed or the connection was lost."""

    code = "publish_unconfirmed"
    retryable = True
