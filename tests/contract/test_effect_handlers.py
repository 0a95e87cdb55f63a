"""Handlers that ask for the transaction: what they write happens once, one message at a time or a whole batch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from holdfast.bootstrap import System
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging.codec import Codec
from holdfast.messaging.injection import PerMessage
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery, Message, Outgoing
from holdfast.messaging.retry import Reject, Retry, RetryPolicy
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    ONCE,
    QUEUE,
    TYPES,
    Ledger,
    Memo,
    Note,
    counts_become,
    manual_clock,
    note,
    office,
    opened,
    parked_messages,
    parks,
    pass_time,
    publish,
    raw,
    send,
)


class Sick(Exception):
    """What a failing handler raises."""


def listening(
    *handlers: Callable[..., Awaitable[Any]],
    provide: Mapping[type, Any] | None = None,
    local: RetryPolicy = ONCE,
    durable: RetryPolicy = ONCE,
) -> Listen:
    return Listen(
        name="reader", queue=QUEUE, handlers=list(handlers), provide=provide or {}, local=local, durable=durable
    )


def memo(system: System, body: str) -> Outgoing:
    """A message of the other type."""
    properties, encoded = Codec(TYPES).encode(Memo(body))
    return raw(note(system), body=encoded, type=properties.type)


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


# -- one message at a time --------------------------------------------------------------------------------------------


async def test_many_messages_share_transactions_although_each_is_handled_alone(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    transactions: list[Tx] = []

    async def book(tx: Tx, body: Note, *, delivery: Delivery, message: Message, clock: Clock) -> None:
        assert (delivery.message is message, clock is system.clock) == (True, True)
        transactions.append(tx)
        await ledger.write(tx, [body])

    await send(system, *numbers(40))
    system.listen(listening(book))
    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == numbers(40)
    assert len(transactions) == 40
    assert len({id(tx) for tx in transactions}) < 5


async def test_a_copy_of_a_message_has_no_second_effect(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)

    async def book(tx: Tx, body: Note) -> None:
        await ledger.write(tx, [body])

    await send(system, "first", message_id="same")
    await send(system, "in the same batch", message_id="same")
    system.listen(listening(book))
    await counts_become(system, (0, 0, 0))
    await send(system, "later", message_id="same")
    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == ["first"]
    assert await parked_messages(system) == []


async def test_each_ends_as_its_own_failure_says_and_its_neighbours_work_stays(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    ledger = await Ledger.of(system)
    failures: dict[str, Exception] = {"sick": Sick("b"), "rejected": Reject("no use"), "later": Retry(5_000)}
    attempts: list[tuple[str, int]] = []

    async def book(tx: Tx, body: Note, delivery: Delivery) -> None:
        await ledger.write(tx, [body])
        if body.text in failures:
            raise failures[body.text]
        attempts.append((body.text, delivery.attempt))

    await send(system, "1", "sick", "2", "rejected", "later", "3")
    system.listen(listening(book, durable=RetryPolicy(tries=2, interval_ms=10_000)))
    await counts_become(system, (0, 0, 2))
    assert await ledger.entries() == ["1", "2", "3"]
    (kept,) = await parked_messages(system)
    assert kept.reason.startswith("Reject: no use")
    failures.clear()
    attempts.clear()
    await pass_time(system, clock, 5)
    await counts_become(system, (0, 0, 1))
    await pass_time(system, clock, 5)
    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == ["1", "2", "3", "later", "sick"]
    assert attempts == [("later", 1), ("sick", 2)]  # the one did not count, the other did


# -- a whole batch ----------------------------------------------------------------------------------------------------


async def test_a_whole_batch_is_one_call_and_the_guilty_one_is_found(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    sizes: list[int] = []

    async def book(tx: Tx, bodies: Sequence[Note], messages: Sequence[Message]) -> None:
        assert len(bodies) == len(messages)
        sizes.append(len(bodies))
        await ledger.write(tx, bodies)
        if Note("poison") in bodies:
            raise Sick("poison")

    await send(system, *numbers(20), "poison", *numbers(20))
    system.listen(listening(book))
    (kept,) = await parks(system)
    await counts_become(system, (0, 0, 0))
    assert sizes[0] == 41
    assert await ledger.entries() == numbers(20) * 2
    assert kept.reason.startswith("Sick: poison")


async def test_outcomes_of_a_batch_in_a_transaction_are_refused_and_nothing_of_it_stays(
    start_system: StartSystem,
) -> None:
    """Nobody looks at them: they would be failures that are acked."""
    system = await office(start_system)
    ledger = await Ledger.of(system)

    async def book(tx: Tx, bodies: Sequence[Note]) -> Any:
        await ledger.write(tx, bodies)
        return [Sick("b") for _ in bodies]

    await send(system, "a", "b")
    system.listen(listening(book, local=RetryPolicy(tries=5, interval_ms=1)))
    kept = await parks(system, 2)
    assert all("answers nothing" in each.reason for each in kept)
    assert await ledger.entries() == []


# -- several types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
async def test_one_handler_of_several_types_keeps_their_order_in_one_transaction(
    start_system: StartSystem, whole: bool
) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    transactions: set[int] = set()

    async def write(tx: Tx, bodies: Sequence[Note | Memo]) -> None:
        transactions.add(id(tx))
        await ledger.write(tx, [Note(f"{type(each).__name__} {each.text}") for each in bodies])

    async def book_all(tx: Tx, bodies: Sequence[Note | Memo]) -> None:
        await write(tx, bodies)

    async def book(tx: Tx, body: Note | Memo) -> None:
        await write(tx, [body])

    mixed = [memo(system, each) if int(each) % 3 else note(system, each) for each in numbers(30)]
    await publish(system, mixed)
    system.listen(listening(book_all if whole else book))
    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == [f"{'Memo' if int(each) % 3 else 'Note'} {each}" for each in numbers(30)]
    assert len(transactions) == 1


async def test_handlers_of_several_types_and_kinds_share_a_queue(start_system: StartSystem) -> None:
    """Each type keeps its order; of the order between types nothing is promised."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    got: list[str] = []

    async def book(tx: Tx, body: Note) -> None:
        await ledger.write(tx, [body])

    async def collect(bodies: Sequence[Memo]) -> None:
        got.extend(each.text for each in bodies)

    await publish(system, [memo(system, each) if int(each) % 2 else note(system, each) for each in numbers(20)])
    system.listen(listening(book, collect))
    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == numbers(20)[::2]
    assert got == numbers(20)[1::2]


# -- what it sends ----------------------------------------------------------------------------------------------------


async def test_what_a_failed_effect_sent_was_never_sent(start_system: StartSystem) -> None:
    system = await office(start_system)
    answers: list[str] = []

    async def book(tx: Tx, body: Note) -> None:
        await system.outbox.add(tx, EXCHANGE, KEY, Memo(f"answer to {body.text}"))
        if body.text == "poison":
            raise Sick("after it was added")

    async def hear(body: Memo) -> None:
        answers.append(body.text)

    await send(system, "1", "poison", "2")
    system.listen(listening(book, hear))
    await parks(system)
    await counts_become(system, (0, 0, 0))
    assert sorted(answers) == ["answer to 1", "answer to 2"]


# -- a session of one's own -------------------------------------------------------------------------------------------

entries = Table("own_entry", MetaData(), Column("id", Integer, primary_key=True), Column("text", Text))


@asynccontextmanager
async def own_sessions(system: System, settings: Settings) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """SQLAlchemy sessions of the user's own, on a database of his own beside the system's."""
    async with system.database.transaction() as tx:
        await tx.connection.run_sync(entries.metadata.create_all)
    url = settings.database.url
    driver = "postgresql+asyncpg" if url.startswith("postgresql") else "sqlite+aiosqlite"
    engine = create_async_engine(url.replace(url.partition(":")[0], driver))
    try:
        yield async_sessionmaker(engine)
    finally:
        await engine.dispose()


async def stored(sessions: async_sessionmaker[AsyncSession]) -> list[str]:
    async with sessions() as session:
        return list((await session.execute(select(entries.c.text).order_by(entries.c.id))).scalars())


@pytest.mark.parametrize("whole", [False, True])
async def test_a_session_is_opened_for_each_call_and_commits_only_what_worked(settings: Settings, whole: bool) -> None:
    async with opened(settings) as system, own_sessions(system, settings) as sessions:
        seen: list[AsyncSession] = []
        calls: list[str] = []

        async def store(body: Note, session: AsyncSession) -> None:
            seen.append(session)
            calls.append(body.text)
            await session.execute(insert(entries).values(text=body.text))
            if body.text == "never" or calls.count(body.text) == 1:
                raise Sick(body.text)

        async def store_all(bodies: Sequence[Note], session: AsyncSession) -> None:
            for each in bodies:
                await store(each, session)

        again = RetryPolicy(tries=2, interval_ms=1)
        provide: dict[type, Any] = {AsyncSession: PerMessage(sessions.begin)}
        system.listen(listening(store_all if whole else store, provide=provide, local=again))
        await send(system, "second time lucky")
        await counts_become(system, (0, 0, 0))
        await send(system, "never")
        (kept,) = await parks(system)
        assert kept.reason.startswith("Sick: never")
        assert calls == ["second time lucky"] * 2 + ["never"] * 2
        assert await stored(sessions) == ["second time lucky"]
        assert len({id(each) for each in seen}) == len(seen) == 4
        assert not any(each.in_transaction() for each in seen)


async def test_a_commit_that_fails_on_leaving_is_a_failure_of_the_handler(settings: Settings) -> None:
    async with opened(settings) as system, own_sessions(system, settings) as sessions:
        failing = [True]

        @asynccontextmanager
        async def begun() -> AsyncIterator[AsyncSession]:
            async with sessions.begin() as session:
                yield session
                if failing:
                    failing.pop()
                    raise Sick("the commit failed")

        async def store(body: Note, session: AsyncSession) -> None:
            await session.execute(insert(entries).values(text=body.text))

        again = RetryPolicy(tries=2, interval_ms=1)
        system.listen(listening(store, provide={AsyncSession: PerMessage(begun)}, local=again))
        await send(system, "kept once")
        await counts_become(system, (0, 0, 0))
        assert await stored(sessions) == ["kept once"]
        assert await parked_messages(system) == []


def test_a_session_maker_is_no_session() -> None:
    with pytest.raises(InvalidInput, match="PerMessage"):
        PerMessage(async_sessionmaker()())  # type: ignore[arg-type]
