"""Listen: one consumer as data: its queue, its handlers, and how carefully they are called."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any

import msgspec

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import InvalidInput
from holdfast.messaging.handlers import AckMode, Bound, bind
from holdfast.messaging.injection import Handler, Incoming, name_of
from holdfast.messaging.recover import Recoverer
from holdfast.messaging.retry import RetryPolicy

Effect = Callable[[Tx, Sequence[Any]], Awaitable[None]]
Plain = Callable[[Incoming], Awaitable[None]]


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer: its name (the inbox remembers effects under it), its queue, and its handlers.

    `handlers` say by their annotations which class of body they take and what else they are given (see
    `holdfast.messaging.injection`); `provide` holds what is the user's own to give. `effects` and `plain` name the
    class of each body instead. Raises `InvalidInput` for settings that contradict each other; what is wrong with a
    handler is told when the listener is made.
    """

    name: str
    queue: str
    handlers: Sequence[Handler] = ()
    provide: Mapping[Any, Any] = {}  # class -> what a handler that asks for it is given
    effects: Mapping[type, Effect] = {}
    plain: Mapping[type, Plain] = {}
    ack: AckMode = "auto"
    prefetch: int = 200
    concurrency: int = 32  # handlers at once, effects aside
    batch_max: int = 100  # messages in one call of a batch handler
    group: GroupCommit | None = None  # the writer of its effects; the toolkit's own unless given
    recover: Recoverer | None = None  # what becomes of a message that is given up on; the toolkit's own unless given
    time_limit_ms: int | None = None  # for handlers other than effects; then it is cancelled and the attempt has failed
    key: Callable[[Any], Hashable | None] | None = None  # bodies of one key are handled one after the other, in order
    outage_after: int = 20  # failures in a row after which deliveries are tried one at a time
    outage_wait_ms: int = 1_000  # after each failure then
    local: RetryPolicy = RetryPolicy(tries=3, interval_ms=1_000)
    durable: RetryPolicy = RetryPolicy(tries=10, interval_ms=5_000, multiplier=2.0, jitter=0.1)

    def __post_init__(self) -> None:
        if not (self.handlers or self.effects or self.plain):
            raise InvalidInput(f"listener {self.name!r} has no handler")
        if self.effects and self.ack != "auto":
            raise InvalidInput(f"listener {self.name!r}: effects ack within their transaction; use ack='auto'")
        for name in ("prefetch", "concurrency", "batch_max", "outage_after"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"listener {self.name!r}: {name} is at least 1, not {getattr(self, name)}")
        if self.time_limit_ms is not None and self.time_limit_ms < 1:
            raise InvalidInput(f"listener {self.name!r}: time_limit_ms is at least 1, not {self.time_limit_ms}")
        if both := set(self.effects) & set(self.plain):
            raise InvalidInput(f"listener {self.name!r} handles {sorted(kind.__name__ for kind in both)} twice")

    def bound(self, clock: Clock) -> dict[type, Bound]:
        """The handler of each class of body; raises `InvalidInput` for whatever is wrong with one."""
        bounds = bind(self.name, self.handlers, self.provide, clock, ack=self.ack)
        named = {kind: _effect(handler) for kind, handler in self.effects.items()} | {
            kind: Bound(handler=name_of(handler), kind="plain", call=handler) for kind, handler in self.plain.items()
        }
        if both := set(bounds) & set(named):
            raise InvalidInput(f"listener {self.name!r} handles {sorted(kind.__name__ for kind in both)} twice")
        bounds |= named
        kinds = {bound.kind for bound in bounds.values()}
        if "effect" in kinds and (self.time_limit_ms is not None or self.key is not None):
            raise InvalidInput(f"listener {self.name!r}: time_limit_ms and key are not for handlers in a transaction")
        if "batch" in kinds and self.key is not None:
            raise InvalidInput(f"listener {self.name!r}: key is for handlers of one message, not for those of a batch")
        return bounds


def _effect(effect: Effect) -> Bound:
    async def call(tx: Tx, batch: Sequence[Incoming]) -> None:
        await effect(tx, [incoming.body for incoming in batch])

    return Bound(handler=name_of(effect), kind="effect", call=call)
