"""Handlers whose parameters decide, run by a real listener: dispatch, injection, sessions of one's own, settling."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from holdfast.bootstrap import System
from holdfast.clock import Clock
from holdfast.messaging.codec import Codec
from holdfast.messaging.handlers import AckMode, bind
from holdfast.messaging.injection import Incoming, PerMessage
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery, Message, Outgoing, ack
from holdfast.messaging.retry import NO_RETRY, Reject, RetryPolicy
from tests.conftest import StartSystem, eventually
from tests.contract.notes import (
    QUEUE,
    TYPES,
    Ledger,
    Memo,
    Note,
    counts_become,
    note,
    office,
    parks,
    publish,
    raw,
    send,
)

AGAIN = RetryPolicy(tries=2, interval_ms=1)


def listen(
    system: System,
    handlers: list[Callable[..., Awaitable[Any]]],
    provide: Mapping[type, Any] | None = None,
    *,
    ack: AckMode = "auto",
    local: RetryPolicy = NO_RETRY,
) -> None:
    """Start a listener with plain handlers."""
    bounds = bind("reader", handlers, provide or {}, system.clock, ack=ack)
    assert {bound.kind for bound in bounds.values()} == {"plain"}
    plain = {kind: bound.call for kind, bound in bounds.items()}
    system.listen(Listen(name="reader", queue=QUEUE, plain=plain, ack=ack, local=local, durable=NO_RETRY))


def memo(system: System, body: str) -> Outgoing:
    """A message of the other type."""
    properties, encoded = Codec(TYPES).encode(Memo(body))
    return raw(note(system), body=encoded, type=properties.type)


async def test_handlers_are_chosen_by_type_id_and_given_what_they_ask_for(start_system: StartSystem) -> None:
    system = await office(start_system)
    got: list[Any] = []

    async def either(event: Note | Memo, *, clock: Clock, message: Message, delivery: Delivery) -> None:
        got.append((event, clock is system.clock, message.type, delivery.queue))

    listen(system, [either])
    await send(system, "hello")
    await counts_become(system, (0, 0, 0))
    await publish(system, [memo(system, "remember")])
    await counts_become(system, (0, 0, 0))
    assert got == [(Note("hello"), True, "test.note", QUEUE), (Memo("remember"), True, "test.memo", QUEUE)]


class Books:
    """What a handler writes into: a transaction of its own on the real database."""

    def __init__(self, write: Callable[[Note], Awaitable[None]]) -> None:
        self.write = write


async def test_what_is_opened_for_a_message_keeps_what_a_handler_wrote_only_if_it_worked(
    start_system: StartSystem,
) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    tried: list[str] = []

    @asynccontextmanager
    async def books() -> AsyncIterator[Books]:
        async with system.database.transaction() as tx:
            yield Books(lambda each: ledger.write(tx, [each]))

    async def enter(placed: Note, books: Books) -> None:
        await books.write(placed)
        tried.append(placed.text)
        if placed.text == "never":
            raise Reject("it is never entered")
        if tried.count(placed.text) == 1:
            raise ZeroDivisionError

    listen(system, [enter], {Books: PerMessage(books)}, local=AGAIN)
    await send(system, "second time lucky")
    await ledger.holds(1)
    await send(system, "never")
    (parked,) = await parks(system)
    assert parked.reason.startswith("Reject: it is never entered")
    assert tried == ["second time lucky", "second time lucky", "never"]
    assert await ledger.entries() == ["second time lucky"]


async def test_a_whole_message_is_settled_by_its_handler(start_system: StartSystem) -> None:
    system = await office(start_system)
    seen: list[Delivery] = []

    async def full(incoming: Incoming[Note]) -> None:
        seen.append(incoming.delivery)
        if incoming.body.text == "done":
            await incoming.settle(ack(incoming.delivery))

    listen(system, [full], ack="manual")
    await send(system, "done", "left")

    async def both() -> bool:
        return len(seen) == 2

    await eventually(both, "both are seen")
    await counts_become(system, (0, 1, 0))
    assert [each.settled for each in seen] == [True, False]
