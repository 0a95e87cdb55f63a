"""Batch handlers in a real listener: one call for several messages, and an outcome for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from holdfast.errors import InvalidInput, Unavailable
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery, Message, Settlement, ack, park, retry
from holdfast.messaging.retry import Reject, Retry, RetryPolicy
from holdfast.messaging.transport import Transport
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually
from tests.contract.notes import (
    ONCE,
    QUEUE,
    Note,
    counts,
    counts_become,
    manual_clock,
    note,
    office,
    opened,
    parked_messages,
    parks,
    pass_time,
    publish,
    send,
    turn,
    with_messaging,
)

Outcomes = Sequence[Exception | None] | None
PATIENT = {"lease_ms": 600_000, "poll_ms": 60_000}


class Sick(Exception):
    """What a failing handler raises."""


def batchwise(handler: Callable[..., Awaitable[Any]], **options: Any) -> Listen:
    """A listener with one batch handler; it tries once unless told otherwise."""
    given = {"local": ONCE, "durable": ONCE} | options
    return Listen(name="reader", queue=QUEUE, handlers=[handler], **given)


class Shelf:
    """A batch handler that keeps what it got, answers as told, and may be told to wait."""

    def __init__(self, **answers: Exception) -> None:
        self.batches: list[list[str]] = []
        self.attempts: dict[str, list[int]] = {}
        self.answers = answers
        self.open = asyncio.Event()
        self.open.set()

    async def handle(self, notes: Sequence[Note], deliveries: Sequence[Delivery]) -> Outcomes:
        self.batches.append([each.text for each in notes])
        for each, delivery in zip(notes, deliveries, strict=True):
            self.attempts.setdefault(each.text, []).append(delivery.attempt)
        await self.open.wait()
        return [self.answers.get(each.text) for each in notes]

    async def called(self, count: int) -> None:
        async def reached() -> bool:
            return len(self.batches) >= count

        await eventually(reached, f"the handler was called {count} times")


# -- outcomes ---------------------------------------------------------------------------------------------------------


async def test_each_message_of_a_batch_ends_as_its_own_outcome_says(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    shelf = Shelf(sick=Sick("not well"), rejected=Reject("no use"), later=Retry(5_000), away=Unavailable("gone"))
    await send(system, "1", "sick", "2", "rejected", "later", "away", "3")
    system.listen(batchwise(shelf.handle, durable=RetryPolicy(tries=3, interval_ms=10_000)))
    await counts_become(system, (0, 0, 3))
    assert shelf.batches[0] == ["1", "sick", "2", "rejected", "later", "away", "3"]
    (kept,) = await parked_messages(system)
    assert kept.reason.startswith("Reject: no use")

    shelf.answers = {}
    await pass_time(system, clock, 4.999)
    assert shelf.batches[1:] == []
    await pass_time(system, clock, 0.001)
    await counts_become(system, (0, 0, 2))
    await pass_time(system, clock, 5)
    await counts_become(system, (0, 0, 0))
    assert {name: shelf.attempts[name] for name in ("1", "sick", "rejected", "later", "away")} == {
        "1": [1],
        "sick": [1, 2],  # counted
        "rejected": [1],
        "later": [1, 1],
        "away": [1, 1],
    }
    assert len(await parked_messages(system)) == 1


async def test_those_that_fail_are_tried_again_one_by_one_and_the_others_are_not(start_system: StartSystem) -> None:
    system = await office(start_system)
    shelf = Shelf(b=Sick("b"), d=Sick("d"))
    await send(system, *"abcde")
    system.listen(batchwise(shelf.handle, local=RetryPolicy(tries=3, interval_ms=1)))
    kept = await parks(system, 2)
    await counts_become(system, (0, 0, 0))
    assert shelf.batches[0] == [*"abcde"]
    assert sorted(shelf.batches[1:]) == [["b"], ["b"], ["d"], ["d"]]
    assert sorted(each.reason.partition("\n")[0] for each in kept) == ["Sick: b", "Sick: d"]
    assert [each.attempt for each in kept] == [1, 1]


async def test_a_durable_retry_of_a_batch_element_counts_and_comes_with_others_again(start_system: StartSystem) -> None:
    system = await office(start_system)
    shelf = Shelf(poison=Sick("never"))
    await send(system, "1", "poison", "2")
    system.listen(batchwise(shelf.handle, durable=RetryPolicy(tries=3, interval_ms=10)))
    (kept,) = await parks(system)
    assert shelf.attempts == {"1": [1], "2": [1], "poison": [1, 2, 3]}
    assert kept.attempt == 3
    assert await counts(system) == (0, 0, 0)


async def test_returning_nothing_means_that_all_worked(start_system: StartSystem) -> None:
    system = await office(start_system)
    got: list[int] = []

    async def handle(notes: Sequence[Note]) -> None:
        got.append(len(notes))

    await send(system, *"abc")
    system.listen(batchwise(handle))
    await counts_become(system, (0, 0, 0))
    assert got == [3]
    assert await parked_messages(system) == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda notes: [None], "1 outcomes for 3 messages"),
        (lambda notes: [None] * 4, "4 outcomes for 3 messages"),
        (lambda notes: [None, True, None], "outcome 1 is of class bool"),
        (lambda notes: True, "it answered bool"),
        (lambda notes: [note.text for note in notes], "outcome 0 is of class str"),
    ],
    ids=["too few", "too many", "no exception", "no list", "bodies"],
)
async def test_a_wrong_answer_parks_them_all_at_once(
    start_system: StartSystem, answer: Callable[[Sequence[Note]], Any], why: str
) -> None:
    """Which of them worked, nobody can tell; to call again would only repeat the bug."""
    system = await office(start_system)
    calls: list[int] = []

    async def handle(notes: Sequence[Note]) -> Any:
        calls.append(len(notes))
        return answer(notes)

    ids = await send(system, "secret a", "secret b", "secret c")
    again = RetryPolicy(tries=5, interval_ms=1)
    system.listen(batchwise(handle, local=again, durable=again))
    kept = await parks(system, 3)
    assert sorted(each.message_id for each in kept) == sorted(ids)
    assert all(why in each.reason and "handle" in each.reason for each in kept)
    assert not any("secret" in each.reason for each in kept)
    assert calls == [3]
    assert await counts(system) == (0, 0, 0)


async def test_a_batch_that_raises_tries_each_alone(start_system: StartSystem) -> None:
    system = await office(start_system)
    batches: list[list[str]] = []

    async def handle(notes: Sequence[Note]) -> None:
        batches.append([each.text for each in notes])
        if Note("poison") in notes:
            raise Sick("the whole call")

    await send(system, "1", "poison", "2")
    system.listen(batchwise(handle, local=RetryPolicy(tries=2, interval_ms=1)))
    (kept,) = await parks(system)
    await counts_become(system, (0, 0, 0))
    assert batches[0] == ["1", "poison", "2"]
    assert sorted(batches[1:]) == [["1"], ["2"], ["poison"]]
    assert kept.reason.startswith("Sick: the whole call")


async def test_a_fatal_error_of_the_whole_call_parks_them_all(start_system: StartSystem) -> None:
    system = await office(start_system)
    calls: list[int] = []

    async def handle(notes: Sequence[Note]) -> None:
        calls.append(len(notes))
        raise InvalidInput("none of them can be used")

    await send(system, *"abc")
    system.listen(batchwise(handle, local=RetryPolicy(tries=5, interval_ms=1)))
    assert len(await parks(system, 3)) == 3
    assert calls == [3]


# -- size and time ----------------------------------------------------------------------------------------------------


async def test_a_call_has_no_more_messages_than_allowed_and_in_their_order(start_system: StartSystem) -> None:
    system = await office(start_system)
    shelf = Shelf()
    names = [str(number) for number in range(25)]
    await publish(system, [note(system, name) for name in names])
    system.listen(batchwise(shelf.handle, batch_max=10, concurrency=1, prefetch=30))
    await counts_become(system, (0, 0, 0))
    assert [len(batch) for batch in shelf.batches] == [10, 10, 5]
    assert [name for batch in shelf.batches for name in batch] == names


async def test_no_more_batches_run_at_once_than_allowed(start_system: StartSystem) -> None:
    system = await office(start_system)
    shelf = Shelf()
    shelf.open.clear()
    await send(system, *(str(number) for number in range(10)))
    listener = system.listen(batchwise(shelf.handle, batch_max=2, concurrency=2))
    await shelf.called(2)
    await turn(system)
    assert len(shelf.batches) == 2
    listener.concurrency = 3
    await shelf.called(3)
    await turn(system)
    assert len(shelf.batches) == 3
    shelf.open.set()
    await counts_become(system, (0, 0, 0))
    assert len(shelf.batches) == 5


async def test_a_batch_beyond_its_time_is_cancelled_and_each_tried_alone(start_system: StartSystem) -> None:
    system = await office(start_system)
    batches: list[list[str]] = []
    ended: list[str] = []

    async def handle(notes: Sequence[Note]) -> None:
        batches.append([each.text for each in notes])
        if Note("slow") in notes:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("slow")

    await send(system, "1", "slow", "2")
    system.listen(batchwise(handle, time_limit_ms=100, local=RetryPolicy(tries=2, interval_ms=1)))
    (kept,) = await parks(system)
    await counts_become(system, (0, 0, 0))
    assert batches[0] == ["1", "slow", "2"]
    assert sorted(batches[1:]) == [["1"], ["2"], ["slow"]]
    assert ended == ["slow", "slow"]
    assert kept.reason.startswith("HandlerTimeout: not done within 100 ms")


# -- ack modes --------------------------------------------------------------------------------------------------------


async def test_in_manual_mode_a_batch_settles_what_it_wants(start_system: StartSystem) -> None:
    system = await office(start_system)
    seen: list[tuple[str, int]] = []

    async def handle(batch: Sequence[Incoming[Note]]) -> None:
        for each in batch:
            seen.append((each.body.text, each.delivery.attempt))
            if each.body.text == "done" or each.delivery.attempt == 2:
                await each.settle(ack(each.delivery))
            elif each.body.text == "again":
                await each.settle(retry(each.delivery, 0))

    await send(system, "done", "again", "left")
    listener = system.listen(batchwise(handle, ack="manual"))
    await counts_become(system, (0, 1, 0))
    assert seen == [("done", 1), ("again", 1), ("left", 1), ("again", 2)]
    await listener.stop()
    assert await counts(system) == (1, 0, 0)


async def test_in_manual_mode_a_failure_settles_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    shelf = Shelf(b=Sick("b"))
    await send(system, "a", "b")
    listener = system.listen(batchwise(shelf.handle, ack="manual", local=RetryPolicy(tries=5, interval_ms=1)))
    await shelf.called(1)
    await turn(system)
    assert await counts(system) == (0, 2, 0)
    assert shelf.batches == [["a", "b"]]
    await listener.stop()
    assert await counts(system) == (2, 0, 0)


async def test_in_none_mode_the_whole_batch_is_gone_before_the_handler_runs(start_system: StartSystem) -> None:
    system = await office(start_system)
    left: list[tuple[int, int, int]] = []

    async def handle(notes: Sequence[Note]) -> Outcomes:
        left.append(await counts(system))
        return [Sick("too late") for _ in notes]

    await send(system, *"abc")
    listener = system.listen(batchwise(handle, ack="none", local=RetryPolicy(tries=5, interval_ms=1)))

    async def called() -> bool:
        return bool(left)

    await eventually(called, "the handler was called")
    await turn(system)
    await listener.stop()
    assert left == [(0, 0, 0)]
    assert await counts(system) == (0, 0, 0)
    assert await parked_messages(system) == []


# -- stop and pause ---------------------------------------------------------------------------------------------------


async def test_stop_lets_a_running_batch_finish_and_does_what_its_outcomes_say(settings: Settings) -> None:
    patient = with_messaging(settings, **PATIENT)
    shelf = Shelf(sick=Sick("b"), rejected=Reject("no use"), later=Retry(60_000))
    async with opened(patient) as system:
        shelf.open.clear()
        await send(system, "ok", "sick", "rejected", "later", "never begun")
        durable = RetryPolicy(tries=5, interval_ms=120_000)
        listener = system.listen(batchwise(shelf.handle, batch_max=4, concurrency=1, durable=durable))
        await shelf.called(1)
        stopping = asyncio.create_task(listener.stop(WAIT_S))
        await turn(system)
        assert not stopping.done()
        shelf.open.set()
        await stopping
        assert shelf.batches == [["ok", "sick", "rejected", "later"]]
        assert await counts(system) == (1, 0, 2)
        assert [each.reason.partition("\n")[0] for each in await parked_messages(system)] == ["Reject: no use"]
        await send(system, "marker")
        await turn(system)
        assert shelf.batches[1:] == []


class Thoughtful:
    """A recoverer that takes its time, as one does that publishes elsewhere first."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        self.begun.set()
        await self.open.wait()
        return park(delivery, f"thought over: {error}")


async def test_stop_waits_for_what_a_batch_that_failed_leads_to(settings: Settings) -> None:
    """Else the message is given back although its replacement is out, and what decides about it runs on unwatched."""
    patient = with_messaging(settings, **PATIENT)
    shelf, recoverer = Shelf(sick=Sick("b")), Thoughtful()
    async with opened(patient) as system:
        shelf.open.clear()
        await send(system, "ok", "sick")
        listener = system.listen(batchwise(shelf.handle, recover=recoverer))
        await shelf.called(1)
        stopping = asyncio.create_task(listener.stop(WAIT_S))
        await turn(system)
        shelf.open.set()
        await asyncio.wait_for(recoverer.begun.wait(), WAIT_S)
        await turn(system)
        assert not stopping.done()
        recoverer.open.set()
        await stopping
        assert await counts(system) == (0, 0, 0)
        assert [each.reason for each in await parked_messages(system)] == ["thought over: b"]


async def test_what_a_batch_that_failed_leads_to_ends_with_the_drain(settings: Settings) -> None:
    patient = with_messaging(settings, **PATIENT)
    shelf, recoverer = Shelf(sick=Sick("b")), Thoughtful()
    async with opened(patient) as system:
        before = asyncio.all_tasks()
        shelf.open.clear()
        await send(system, "ok", "sick")
        listener = system.listen(batchwise(shelf.handle, recover=recoverer))
        await shelf.called(1)
        stopping = asyncio.create_task(listener.stop(0.2))
        await turn(system)
        shelf.open.set()
        await asyncio.wait_for(recoverer.begun.wait(), WAIT_S)
        await stopping
        await turn(system)
        assert {task for task in asyncio.all_tasks() - before if task is not stopping} == set()
        assert await counts(system) == (1, 0, 0)
        assert await parked_messages(system) == []


async def test_a_batch_slower_than_the_drain_is_cancelled_and_given_back(settings: Settings) -> None:
    patient = with_messaging(settings, drain_ms=50, **PATIENT)
    shelf = Shelf()
    shelf.open.clear()
    async with opened(patient) as system:
        await send(system, "a", "b")
        system.listen(batchwise(shelf.handle))
        await shelf.called(1)
    async with opened(patient) as system:
        assert await counts(system) == (2, 0, 0)
        shelf.open.set()
        system.listen(batchwise(shelf.handle))
        await counts_become(system, (0, 0, 0))
    assert shelf.batches == [["a", "b"], ["a", "b"]]
    assert shelf.attempts == {"a": [1, 1], "b": [1, 1]}


async def test_paused_it_finishes_what_it_has_and_takes_no_more(start_system: StartSystem) -> None:
    system = await office(start_system)
    shelf = Shelf()
    shelf.open.clear()
    await send(system, "a", "b")
    listener = system.listen(batchwise(shelf.handle))
    await shelf.called(1)
    listener.pause()
    shelf.open.set()
    await counts_become(system, (0, 0, 0))
    await send(system, "c", "d")
    await turn(system)
    assert await counts(system) == (2, 0, 0)
    assert shelf.batches == [["a", "b"]]
    listener.resume()
    await counts_become(system, (0, 0, 0))
    assert shelf.batches == [["a", "b"], ["c", "d"]]


async def test_messages_come_beside_their_bodies(start_system: StartSystem) -> None:
    system = await office(start_system)
    got: list[tuple[str, str]] = []

    async def handle(*, messages: Sequence[Message], notes: Sequence[Note]) -> None:
        got.extend((each.message_id, body.text) for each, body in zip(messages, notes, strict=True))

    ids = await send(system, "a", "b", "c")
    system.listen(batchwise(handle))
    await counts_become(system, (0, 0, 0))
    assert got == list(zip(ids, "abc", strict=True))
