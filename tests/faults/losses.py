"""Events that a fault may lose on their way from a caller to an effect, and whether each arrived exactly once.

An event is committed once its caller was told so, or once its business row is there: a caller in doubt asks again, with
the same message id or the same business key, except for some who give up and whose rows alone tell what became of them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sqlalchemy import text

from holdfast.bootstrap import System
from holdfast.db.border import KeyTaken
from holdfast.db.database import Tx
from holdfast.errors import OutcomeUnknown, PublishRejected, PublishUnconfirmed, Unavailable
from holdfast.messaging.listen import Effect, Listen
from holdfast.messaging.retry import RetryPolicy
from tests.conftest import eventually
from tests.contract.notes import EXCHANGE, KEY, Ledger, Note, effectively, parked_everywhere

PATIENCE_S = 60.0
PAUSE_S = 0.02
GIVES_UP = 0.2  # callers who do not ask again when they were told that the outcome is unknown
LOCAL = RetryPolicy(tries=1)  # each failure is a durable redelivery
DURABLE = RetryPolicy(tries=1_000, interval_ms=5)

T = TypeVar("T")
Strike = Callable[[Tx], Awaitable[None]]
"""What goes wrong in an open transaction, if anything."""


async def nothing(_: Tx) -> None:
    """No fault."""


class Events:
    """Sends events whatever happens, each through the publisher or through the outbox, and knows which must arrive."""

    def __init__(self, system: System, ledger: Ledger, chance: random.Random, strike: Strike = nothing) -> None:
        self.confirmed: set[str] = set()
        self.failures: Counter[str] = Counter()  # what callers were told, so that a test sees that its fault happened
        self._system = system
        self._ledger = ledger
        self._chance = chance
        self._strike = strike  # after the writes of a caller, before the commit
        self._numbers = 0

    async def move_to(self, system: System) -> None:
        """Go on with the next system on the same database."""
        self._system, self._ledger = system, await Ledger.of(system)

    def names(self, count: int) -> list[str]:
        """Names of new events."""
        self._numbers += count
        return [f"event-{number}" for number in range(self._numbers - count, self._numbers)]

    async def send(self, count: int, exchange: str = EXCHANGE, key: str = KEY) -> None:
        """Send so many events at once, half of them by each way; returns when every caller is done."""
        ways = (self.publish, self.commit)
        names = self.names(count)
        await asyncio.gather(*(ways[at % 2](name, exchange, key) for at, name in enumerate(names)))

    async def publish(self, name: str, exchange: str = EXCHANGE, key: str = KEY) -> None:
        """Publish, again and again under one message id, until it is confirmed."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self._system.publisher.publish(exchange, key, Note(name), message_id=name)
                except (PublishRejected, PublishUnconfirmed) as error:
                    if not error.retryable:
                        raise
                    self.failures[error.code] += 1
                else:
                    break
                await asyncio.sleep(PAUSE_S)
        self.confirmed.add(name)

    async def commit(self, name: str, exchange: str = EXCHANGE, key: str = KEY) -> None:
        """Write a business row and a message in one transaction, again and again, until both are there."""
        gives_up = self._chance.random() < GIVES_UP
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    async with self._system.database.transaction() as tx:
                        await self._ledger.write_once(tx, name)
                        await self._system.outbox.add(tx, exchange, key, Note(name))
                        await self._strike(tx)
                except KeyTaken:
                    break  # a former attempt was committed after all
                except (Unavailable, OutcomeUnknown) as error:
                    self.failures[error.code] += 1
                    if gives_up and isinstance(error, OutcomeUnknown):
                        return
                else:
                    break
                await asyncio.sleep(PAUSE_S)
        self.confirmed.add(name)

    async def committed(self) -> list[str]:
        """Every event whose effect must happen."""
        return sorted(set(await insist(self._keys)) | self.confirmed)

    async def violations(self) -> list[str]:
        """Wait until nothing waits any more, then compare: effects, what waits, what was given up on."""
        wanted = await self.committed()
        found = []
        try:
            await eventually(self._at_rest, "nothing waits any more", PATIENCE_S)
        except AssertionError:
            found.append(f"{await insist(self._waiting)} messages wait")
        happened = Counter(await insist(self._ledger.entries))
        for name, times in sorted((happened - Counter(wanted)).items()):
            found.append(f"{name} had {happened[name]} effects, {times} too many")
        found += [f"{name} was committed and had no effect" for name in sorted(Counter(wanted) - happened)]
        given_up = await insist(lambda: parked_everywhere(self._system))
        return found + [f"{queue}: message {message_id} is parked" for queue, message_id in given_up]

    async def _at_rest(self) -> bool:
        return await insist(self._waiting) == 0

    async def _waiting(self) -> int:
        async with self._system.database.read() as tx:
            return int((await tx.execute(text("SELECT count(*) FROM hf_message"))).scalar_one())

    async def _keys(self) -> list[str]:
        async with self._system.database.read() as tx:
            return list((await tx.execute(text("SELECT key FROM test_key"))).scalars())


async def insist(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask the database until it answers: the pool may hold connections that were cut."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(PAUSE_S)


def consumer(effect: Effect) -> Listen:
    """A consumer of the events that is not to give up on any, whatever fails."""
    return effectively(effect, local=LOCAL, durable=DURABLE, prefetch=8, outage_wait_ms=10)


async def events_of(
    system: System, chance: random.Random, *, sending: Strike = nothing, handling: Strike = nothing
) -> Events:
    """Events of a system whose consumer listens; the strikes come after the writes of callers and of the consumer."""
    ledger = await Ledger.of(system)

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await ledger.write(tx, notes)
        await handling(tx)

    system.listen(consumer(effect))
    return Events(system, ledger, chance, sending)
