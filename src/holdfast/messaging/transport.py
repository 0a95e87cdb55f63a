"""The Transport protocol and Features: what a backend promises, on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import msgspec

from holdfast.db.database import Tx
from holdfast.errors import PublishError
from holdfast.messaging.message import Delivery, Outgoing, Settlement
from holdfast.messaging.topology import Topology


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend can do; the contract suite reads it, and so do we before we rely on something."""

    name: str
    shares_database: bool  # messages live in the tables of the user's own database
    native_delay: bool  # any delay without help from above
    several_processes: bool  # more than one process may work on it
    declares: frozenset[str] = frozenset()  # what of exchanges and queues goes beyond plain durable ones


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """A queue at one instant, in RabbitMQ's words."""

    ready: int  # may be delivered now
    unacked: int  # delivered and not settled
    delayed: int  # not due yet

    @property
    def total(self) -> int:
        return self.ready + self.unacked + self.delayed


class Subscription(Protocol):
    """A consumer on one queue that holds at most `prefetch` unsettled deliveries."""

    async def take(self) -> list[Delivery]:
        """Wait for the next deliveries, at least one; an empty list says that the subscription was closed."""
        ...

    def limit(self, prefetch: int) -> None:
        """Hold at most so many from now on; with 0 nothing more is taken."""
        ...

    def stop(self) -> None:
        """Take no more: a waiting `take` returns, what is held may still be settled."""
        ...

    async def settle(self, settlements: Sequence[Settlement], tx: Tx | None = None) -> None:
        """Settle deliveries, within `tx` where the transport shares its database (then with its commit, or not at all).

        Raises `AlreadySettled` for a delivery that was settled before; `Unavailable` or `OutcomeUnknown` when the
        transport is away, and then the delivery comes again.
        """
        ...

    async def __aenter__(self) -> Subscription: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop taking and give unsettled deliveries back to the queue at once."""
        ...


class Transport(Protocol):
    """Five verbs. What is confirmed is stored; what is delivered comes again until it is settled."""

    @property
    def features(self) -> Features: ...

    async def declare(self, topology: Topology) -> None:
        """Make exchanges, queues and bindings exist.

        Raises `TopologyMismatch` naming both values of what exists with other arguments, and for what this backend does
        not offer; then nothing was declared.
        """
        ...

    async def check(self, topology: Topology) -> None:
        """Declare nothing; raises `TopologyMismatch` that names all that is missing or differs."""
        ...

    async def topology(self) -> Topology:
        """What is declared now."""
        ...

    async def publish(self, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        """Send and wait: for each message None when it is stored in every queue it routes to, or what went wrong.

        The outcomes are never confused: `Unroutable`, `PublishRejected` (not stored), `PublishUnconfirmed` (unknown).
        """
        ...

    def subscribe(self, queue: str, *, prefetch: int) -> Subscription:
        """A consumer; each message goes to one of the queue's consumers at a time.

        Entering it raises `NoSuchQueue`, or `TopologyMismatch` for the exclusive queue of another instance.
        """
        ...

    async def stats(self, queue: str) -> QueueStats:
        """Count the queue's messages; raises `InvalidInput` for a queue that does not exist."""
        ...

    async def close(self) -> None: ...


class SharesDatabase(Protocol):
    """What a transport offers besides when its messages live in the database of the business rows."""

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        """Write messages within `tx`: they exist if and only if it commits."""
        ...

    async def cancel_in(self, tx: Tx, cancel_keys: Sequence[str]) -> int:
        """Remove pending messages by key within `tx`; answers how many. One already delivered stays."""
        ...

    async def move_in(self, tx: Tx, cancel_keys: Sequence[str], due_us: int) -> int:
        """Let messages pending under these keys be due at `due_us` instead, within `tx`; answers how many."""
        ...
