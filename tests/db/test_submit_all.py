"""Several requests handed in at once: each is answered in its place, as if it had been submitted alone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.clock import ManualClock
from holdfast.db.connect import connect
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import TRIES_MAX, GroupCommit
from holdfast.errors import (
    HoldfastError,
    InvalidInput,
    OutcomeUnknown,
    Overloaded,
    Refused,
    ShuttingDown,
    Unavailable,
)
from holdfast.settings import DatabaseSettings
from tests.db.jars import content, make_jars, put
from tests.db.test_group_commit import (
    PATIENCE_S,
    REQUESTS,
    Gate,
    Request,
    Troubled,
    alone,
    decide_red,
    grouping,
    loop_turns,
    memory,
    metric,
    told,
)
from tests.unit.given import steady

__all__ = ["memory"]  # a fixture


def said(answers: Sequence[Any]) -> list[tuple[str, str]]:
    """Answers and failures in their places, as `told` says them."""
    return [
        (type(answer).__name__, str(answer)) if isinstance(answer, Exception) else ("answer", str(answer))
        for answer in answers
    ]


async def decide_any(tx: Tx, requests: Sequence[Request]) -> list[int | HoldfastError]:
    return await decide_red(tx, requests)


# -- the promise, as a property ---------------------------------------------------------------------------------------

WISHES = st.lists(
    st.tuples(st.lists(REQUESTS, max_size=10), st.integers(0, 40)),
    min_size=1,
    max_size=8,
)


@settings(steady, max_examples=80)
@given(wishes=WISHES, lone=st.lists(st.tuples(REQUESTS, st.integers(0, 40)), max_size=6), batch_max=st.integers(1, 30))
def test_each_request_gets_what_it_would_have_got_alone(
    wishes: list[tuple[list[Request], int]], lone: list[tuple[Request, int]], batch_max: int
) -> None:
    """`wishes` are what is handed in together, and `lone` what others submit, after so many loop turns."""

    async def run() -> None:
        database = await connect(DatabaseSettings(url="sqlite://"))
        await make_jars(database, "red", "blue")
        arrived: list[Request] = []
        answers: dict[int, tuple[str, str]] = {}

        async def together(requests: list[Request], turns: int) -> None:
            await loop_turns(turns)
            first = len(arrived)
            arrived.extend(requests)
            async with asyncio.timeout(PATIENCE_S):
                given = said(await group.submit_all(decide_any, requests))
            assert len(given) == len(requests)
            answers.update(zip(range(first, first + len(requests)), given, strict=True))

        async def one(request: Request, turns: int) -> None:
            await loop_turns(turns)
            number = len(arrived)
            arrived.append(request)
            answers[number] = await told(group.submit(decide_any, request))

        async with grouping(database, batch_max=batch_max) as group:
            await asyncio.gather(*(together(*wish) for wish in wishes), *(one(*wish) for wish in lone))
        assert ([answers[at] for at in range(len(arrived))], await content(database)) == alone(arrived)
        await database.close()

    asyncio.run(run())


async def test_the_property_holds_on_each_backend(database: Database) -> None:
    await make_jars(database, "red", "blue")
    kinds = [(4, False), (3, True), (7, False), (2, True), (6, False), (1, False), (1, True), (0, False)]
    requests = [Request("red", beans, crashes) for beans, crashes in kinds]
    async with grouping(database) as group:
        answers = said(await group.submit_all(decide_any, requests))
        assert await group.submit_all(decide_any, []) == []
    assert (answers, await content(database)) == alone(requests)


# -- answers in place -------------------------------------------------------------------------------------------------


async def test_answers_refusals_and_crashes_stand_in_their_places_and_it_was_one_batch(memory: Database) -> None:
    async with grouping(memory, name="together") as group:
        requests = [Request("red", 8), Request("red", 5), Request("red", 2)]
        answers = await group.submit_all(decide_red, requests)
        assert said(answers) == [("answer", "8"), ("Refused", "5 are too many"), ("answer", "10")]
        assert isinstance(answers[1], Refused)
        assert metric("batch_size_count", "together") == 1
        crashed = await group.submit_all(decide_red, [Request("red", 0), Request("red", 0, crashes=True)])
    assert [kind for kind, _ in said(crashed)] == ["answer", "ValueError"]
    assert await content(memory) == {"red": 10, "blue": 0}


async def test_each_failure_is_an_error_of_its_own(memory: Database) -> None:
    """One raised instance would gather the tracebacks of all who raise it on."""
    troubled = Troubled(memory, *[Unavailable("away")] * TRIES_MAX)
    async with grouping(troubled) as group:
        answers = await group.submit_all(decide_red, [Request("red", 1)] * 3)
        assert said(answers) == [("Unavailable", "away")] * 3
        assert len({id(answer) for answer in answers}) == 3
        assert said(await group.submit_all(decide_red, [Request("red", 1)])) == [("answer", "1")]


async def test_an_unknown_outcome_stands_in_the_place_of_each(memory: Database) -> None:
    troubled = Troubled(memory, OutcomeUnknown("lost"))
    async with grouping(troubled) as group:
        answers = await group.submit_all(decide_red, [Request("red", 1), Request("red", 2)])
    assert said(answers) == [("OutcomeUnknown", "lost")] * 2
    assert await content(memory) == {"red": 3, "blue": 0}


async def test_what_the_queue_has_no_room_for_is_refused_in_its_place(memory: Database) -> None:
    gate = Gate()
    async with grouping(memory, name="full together", queue_max=2) as group:
        first = gate.hand_in(group, "a")
        await gate.entered.wait()
        many = asyncio.create_task(group.submit_all(gate.decide, ["b", "c", "d", "e"]))
        await loop_turns()
        assert metric("refused_total", "full together") == 2
        gate.opened.set()
        answers = await asyncio.wait_for(many, PATIENCE_S)
        await asyncio.gather(*first)
        assert answers[:2] == ["b is done", "c is done"]
        assert [type(answer) for answer in answers[2:]] == [Overloaded, Overloaded]
        assert await group.submit_all(gate.decide, ["f"]) == ["f is done"]
    assert set(await content(memory)) == {"red", "blue", "a", "b", "c", "f"}


async def test_a_writer_that_is_stopping_refuses_each_in_its_place(memory: Database) -> None:
    gate = Gate(is_open=True)
    group = GroupCommit(memory, ManualClock(), name="stopping together")
    group.start()
    await group.close()
    answers = await group.submit_all(gate.decide, ["a", "b"])
    assert [type(answer) for answer in answers] == [ShuttingDown, ShuttingDown]
    assert gate.batches == []


async def test_what_was_handed_in_before_closing_is_decided(memory: Database) -> None:
    gate = Gate()
    group = GroupCommit(memory, ManualClock(), name="closing together", batch_max=1)
    group.start()
    many = asyncio.create_task(group.submit_all(gate.decide, ["a", "b", "c"]))
    await gate.entered.wait()
    closing = asyncio.create_task(group.close())
    await loop_turns()
    gate.opened.set()
    await asyncio.wait_for(closing, PATIENCE_S)
    assert await many == ["a is done", "b is done", "c is done"]


async def test_a_decision_of_the_same_writer_may_not_wait_for_it(memory: Database) -> None:
    async def nested(tx: Tx, requests: Sequence[str]) -> list[str]:
        await group.submit_all(decide_red, [Request("red", 1)])
        return list(requests)

    async with grouping(memory) as group:
        (answer,) = await group.submit_all(nested, ["a"])
    assert isinstance(answer, InvalidInput)
    assert await content(memory) == {"red": 0, "blue": 0}


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What the running loop complains about: failures that nobody asked for."""
    told: list[str] = []
    yield told
    gc.collect()
    assert told == []


def listen_to_complaints(complaints: list[str]) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context["message"])))


async def test_cancelled_while_all_wait_none_of_them_leaves_a_trace(memory: Database, complaints: list[str]) -> None:
    listen_to_complaints(complaints)
    gate = Gate()
    async with grouping(memory) as group:
        first = gate.hand_in(group, "a")
        await gate.entered.wait()
        many = asyncio.create_task(group.submit_all(gate.decide, ["b", "c"]))
        other = gate.hand_in(group, "d")
        await loop_turns()
        many.cancel()
        await loop_turns()
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(*first, *other), PATIENCE_S)
    assert many.cancelled()
    assert gate.batches == [["a"], ["d"]]
    assert set(await content(memory)) == {"red", "blue", "a", "d"}


async def test_cancelled_during_their_batch_they_are_decided_all_the_same(
    memory: Database, complaints: list[str]
) -> None:
    listen_to_complaints(complaints)
    gate = Gate()
    async with grouping(memory, batch_max=2) as group:
        many = asyncio.create_task(group.submit_all(gate.decide, ["a", "b", "not begun"]))
        await gate.entered.wait()
        many.cancel()
        await loop_turns()
        gate.opened.set()
        assert await group.submit(gate.decide, "after") == "after is done"
    assert many.cancelled()
    assert gate.batches == [["a", "b"], ["after"]]
    assert set(await content(memory)) == {"red", "blue", "a", "b", "after"}


async def test_cancelled_while_failures_are_on_their_way_nobody_complains_that_they_were_not_fetched(
    memory: Database, complaints: list[str]
) -> None:
    """All answers of a batch come in one turn of the loop; a cancellation in that very turn finds them all there."""
    listen_to_complaints(complaints)
    tasks: list[asyncio.Task[Any]] = []

    async def decide(tx: Tx, requests: Sequence[str]) -> list[str | HoldfastError]:
        tx.on_commit(cancel_when_answered)
        await put(tx, "jar")
        return ["fine", *(Refused(f"{each} is refused") for each in requests[1:])]

    def cancel_when_answered() -> None:
        # As soon as the writer has given the answers, and before who waits for them runs.
        if group_has_answered():
            tasks[0].cancel()
        else:
            asyncio.get_running_loop().call_soon(cancel_when_answered)

    def group_has_answered() -> bool:
        waited_for = tasks[0]._fut_waiter  # type: ignore[attr-defined]
        return waited_for is not None and bool(waited_for.done())

    async with grouping(memory, name="on their way") as group:
        tasks.append(asyncio.create_task(group.submit_all(decide, ["a", "b", "c"])))
        await asyncio.wait(tasks, timeout=PATIENCE_S)
    assert tasks[0].cancelled()
    del tasks[:]
    gc.collect()
    await loop_turns()
    assert complaints == []
