"""Group commit: whatever company a request has, its caller gets what it would have got alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import observe
from holdfast.clock import ManualClock
from holdfast.db.connect import connect
from holdfast.db.database import Database, Dialect, Tx
from holdfast.db.group_commit import TRIES_MAX, GroupCommit
from holdfast.errors import (
    Conflict,
    HoldfastError,
    OutcomeUnknown,
    Overloaded,
    PublishError,
    Refused,
    ShuttingDown,
    Unavailable,
)
from holdfast.settings import DatabaseSettings
from tests.db.jars import add, content, make_jars, put
from tests.unit.given import steady

AT_MOST = 10
PATIENCE_S = 10  # for a test that would otherwise hang


class EagerClock(ManualClock):
    """A clock whose sleepers do not wait: time jumps to their instant."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(max(0.0, seconds))
        await asyncio.sleep(0)


class Request(msgspec.Struct, frozen=True):
    """Put beans into the jar of one verb; a crashing one fails after it has written."""

    jar: str
    beans: int
    crashes: bool = False


async def decide_one(tx: Tx, request: Request) -> int | HoldfastError:
    now = await add(tx, request.jar, request.beans, AT_MOST)
    if request.crashes:
        await put(tx, f"crumbs of {request.jar} {request.beans}")
        raise ValueError(f"boom {request}")
    return now if now is not None else Refused(f"{request.beans} are too many")


async def decide_red(tx: Tx, requests: Sequence[Request]) -> list[int | HoldfastError]:
    return [await decide_one(tx, request) for request in requests]


async def decide_blue(tx: Tx, requests: Sequence[Request]) -> list[int | HoldfastError]:
    return [await decide_one(tx, request) for request in requests]


VERBS = {"red": decide_red, "blue": decide_blue}


class Troubled:
    """A real database that has trouble with the next commits, as the given errors say; None is no trouble."""

    dialect: Dialect = "sqlite"

    def __init__(self, database: Database, *troubles: HoldfastError | None) -> None:
        self._database = database
        self.troubles = list(troubles)
        self.commits = 0

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        trouble = self.troubles.pop(0) if self.troubles else None
        async with self._database.transaction() as tx:
            yield tx
            self.commits += 1
            if trouble is not None and not isinstance(trouble, OutcomeUnknown):
                raise trouble
        if trouble is not None:
            raise trouble

    def single(self) -> AbstractAsyncContextManager[Tx]:
        return self.transaction()

    def read(self, *, snapshot: bool = False) -> Any:
        return self._database.read(snapshot=snapshot)

    async def close(self) -> None:
        await self._database.close()


@pytest.fixture
async def memory() -> AsyncIterator[Database]:
    opened = await connect(DatabaseSettings(url="sqlite://"))
    await make_jars(opened, "red", "blue")
    yield opened
    await opened.close()


@asynccontextmanager
async def grouping(database: Database, name: str = "tests", **how: Any) -> AsyncIterator[GroupCommit]:
    """A running group commit on a clock that nobody advances, unless one is given."""
    group = GroupCommit(database, how.pop("clock", None) or EagerClock(), name=name, **how)
    group.start()
    try:
        yield group
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await group.close()


async def told(answer: Coroutine[Any, Any, Any]) -> tuple[str, str]:
    """What the caller gets, as something to compare."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return "answer", str(await answer)
    except Exception as error:
        return type(error).__name__, str(error)


async def tell(group: GroupCommit, *requests: Request) -> list[tuple[str, str]]:
    """Hand in the requests at once, in this order."""
    return await asyncio.gather(*(told(group.submit(VERBS[request.jar], request)) for request in requests))


async def loop_turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Gate:
    """A decide that notes what it got and waits until it is opened."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        if is_open:
            self.opened.set()

    async def decide(self, tx: Tx, requests: Sequence[str]) -> list[str | HoldfastError]:
        self.batches.append(list(requests))
        self.entered.set()
        await self.opened.wait()
        for request in requests:
            await put(tx, request)
        return [f"{request} is done" for request in requests]

    def hand_in(self, group: GroupCommit, *requests: str) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(group.submit(self.decide, request)) for request in requests]


# --- The promise, as a property ---------------------------------------------------------------------------------------


def alone(arrived: Sequence[Request]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The answers and the jars, had each request been decided alone, in order of arrival."""
    beans = {"red": 0, "blue": 0}
    answers = []
    for request in arrived:
        more = beans[request.jar] + request.beans
        if request.crashes:
            answers.append(("ValueError", f"boom {request}"))
        elif more > AT_MOST:
            answers.append(("Refused", f"{request.beans} are too many"))
        else:
            beans[request.jar] = more
            answers.append(("answer", str(more)))
    return answers, beans


REQUESTS = st.builds(
    Request, jar=st.sampled_from(sorted(VERBS)), beans=st.integers(0, 6), crashes=st.sampled_from([False, False, True])
)
WISHES = st.lists(st.tuples(REQUESTS, st.integers(0, 40)), min_size=1, max_size=24)


@settings(steady, max_examples=80)
@given(wishes=WISHES, batch_max=st.integers(1, 30))
def test_each_caller_gets_what_it_would_have_got_alone(wishes: list[tuple[Request, int]], batch_max: int) -> None:
    """`wishes` are requests with the number of loop turns after which each is handed in."""

    async def run() -> None:
        database = await connect(DatabaseSettings(url="sqlite://"))
        await make_jars(database, "red", "blue")
        arrived: list[Request] = []
        answers: list[tuple[str, str]] = []

        async def caller(request: Request, turns: int) -> None:
            await loop_turns(turns)
            number = len(arrived)
            arrived.append(request)
            answers.append(("nothing", ""))
            answers[number] = await told(group.submit(VERBS[request.jar], request))

        async with grouping(database, batch_max=batch_max) as group:
            await asyncio.gather(*(caller(*wish) for wish in wishes))
        assert (answers, await content(database)) == alone(arrived)
        await database.close()

    asyncio.run(run())


async def test_the_property_holds_on_each_backend(database: Database) -> None:
    await make_jars(database, "red", "blue")
    requests = [
        Request(jar, beans, crashes)
        for jar, beans, crashes in [
            ("red", 4, False),
            ("blue", 3, True),
            ("red", 7, False),
            ("red", 2, True),
            ("blue", 9, False),
            ("red", 6, False),
            ("blue", 1, False),
            ("blue", 1, False),
            ("red", 1, True),
        ]
    ]
    async with grouping(database) as group:
        answers = await tell(group, *requests)
    assert (answers, await content(database)) == alone(requests)


@pytest.mark.parametrize("name", ["a nul \x00 byte", "half a pair \ud800"])
async def test_a_value_no_database_can_hold_harms_only_its_own_caller(database: Database, name: str) -> None:
    gate = Gate(is_open=True)
    async with grouping(database) as group, asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(*gate.hand_in(group, "a", name, "b"), return_exceptions=True)
    assert [answers[0], answers[2]] == ["a is done", "b is done"]
    assert {"a", "b"} <= set(await content(database))


# --- Batches ----------------------------------------------------------------------------------------------------------


def metric(name: str, group: str) -> float:
    return observe.registry.get_sample_value(f"holdfast_group_commit_{name}", {"name": group}) or 0.0


async def test_a_lone_request_is_decided_at_once_and_alone(memory: Database) -> None:
    gate = Gate(is_open=True)
    async with grouping(memory, name="lone", clock=ManualClock()) as group:
        (answer,) = gate.hand_in(group, "a")
        assert await asyncio.wait_for(answer, PATIENCE_S) == "a is done"
    assert gate.batches == [["a"]]
    assert (metric("batch_size_count", "lone"), metric("batch_size_sum", "lone")) == (1, 1)
    assert (metric("wait_seconds_count", "lone"), metric("wait_seconds_sum", "lone")) == (1, 0)


async def test_what_arrives_during_a_commit_forms_the_next_batch_in_order_of_arrival(memory: Database) -> None:
    clock = ManualClock()
    gate = Gate()
    async with grouping(memory, name="next", clock=clock, batch_max=4) as group:
        first = gate.hand_in(group, "a")
        await gate.entered.wait()
        others = gate.hand_in(group, *"bcdefg")
        await loop_turns()
        clock.advance(0.25)
        gate.opened.set()
        answers = await asyncio.wait_for(asyncio.gather(*first, *others), PATIENCE_S)
    assert answers == [f"{name} is done" for name in "abcdefg"]
    assert gate.batches == [["a"], ["b", "c", "d", "e"], ["f", "g"]]
    assert (metric("batch_size_count", "next"), metric("batch_size_sum", "next")) == (3, 7)
    assert (metric("wait_seconds_count", "next"), metric("wait_seconds_sum", "next")) == (3, 2 * 0.25)
    assert (
        observe.registry.get_sample_value("holdfast_group_commit_batch_size_bucket", {"name": "next", "le": "2.0"}) == 2
    )


async def test_no_answer_is_given_before_the_commit(memory: Database) -> None:
    seen: list[str] = []

    async def decide(tx: Tx, requests: Sequence[str]) -> list[str]:
        tx.on_commit(lambda: seen.append("committed"))
        for request in requests:
            await put(tx, request)
        return list(requests)

    async with grouping(memory) as group:
        await group.submit(decide, "a")
        assert seen == ["committed"]
        assert "a" in await content(memory)


async def test_a_refusal_is_raised_to_its_caller_and_keeps_its_neighbours_work(memory: Database) -> None:
    async with grouping(memory, name="refusal") as group:
        answers = await tell(group, Request("red", 8), Request("red", 5), Request("red", 2))
    assert answers == [("answer", "8"), ("Refused", "5 are too many"), ("answer", "10")]
    assert metric("batch_size_count", "refusal") == 1
    assert metric("splits_total", "refusal") == 0


async def test_a_crash_splits_the_batch_and_is_counted(memory: Database) -> None:
    async with grouping(memory, name="crash") as group:
        answers = await tell(group, Request("red", 1), Request("red", 2, crashes=True), Request("red", 3))
    assert [kind for kind, _ in answers] == ["answer", "ValueError", "answer"]
    assert await content(memory) == {"red": 4, "blue": 0}
    assert metric("splits_total", "crash") >= 1


@pytest.mark.parametrize("given", [0, 2])
async def test_a_decide_that_gives_too_few_or_too_many_answers_is_isolated(memory: Database, given: int) -> None:
    async def decide(tx: Tx, requests: Sequence[str]) -> list[str]:
        for request in requests:
            await put(tx, request)
        return [answer for request in requests for answer in [request] * (given if request == "odd" else 1)]

    async with grouping(memory) as group:
        answers = await asyncio.gather(*(told(group.submit(decide, name)) for name in ("a", "odd", "b", "c")))
    assert [kind for kind, _ in answers] == ["answer", "ValueError", "answer", "answer"]
    assert await content(memory) == {"red": 0, "blue": 0, "a": 0, "b": 0, "c": 0}


async def test_a_crashing_verb_does_not_fail_another_verb_of_the_batch(memory: Database) -> None:
    async def crash(tx: Tx, requests: Sequence[Request]) -> list[int]:
        await add(tx, "red", 1)
        raise RuntimeError("boom")

    async with grouping(memory) as group:
        bad = asyncio.create_task(told(group.submit(crash, Request("red", 1))))
        good = asyncio.create_task(told(group.submit(decide_blue, Request("blue", 1))))
        assert [await bad, await good] == [("RuntimeError", "boom"), ("answer", "1")]
    assert await content(memory) == {"red": 0, "blue": 1}


# --- Limits, closing, cancelling --------------------------------------------------------------------------------------


async def test_a_request_beyond_the_queue_is_refused_at_once_and_counted(memory: Database) -> None:
    gate = Gate()
    async with grouping(memory, name="full", queue_max=2) as group:
        first = gate.hand_in(group, "a")
        await gate.entered.wait()
        waiting = gate.hand_in(group, "b", "c")
        await loop_turns()
        with pytest.raises(Overloaded, match="2 requests wait already"):
            await group.submit(gate.decide, "d")
        assert metric("refused_total", "full") == 1
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(*first, *waiting), PATIENCE_S)
        assert await group.submit(gate.decide, "e") == "e is done"
    assert set(await content(memory)) == {"red", "blue", "a", "b", "c", "e"}


async def test_closing_decides_what_waits_and_refuses_what_comes(memory: Database) -> None:
    gate = Gate()
    group = GroupCommit(memory, ManualClock(), name="closing", batch_max=1)
    group.start()
    waiting = gate.hand_in(group, "a", "b", "c")
    await gate.entered.wait()
    closing = asyncio.create_task(group.close())
    await loop_turns()
    assert not closing.done()
    with pytest.raises(ShuttingDown):
        await group.submit(gate.decide, "late")
    gate.opened.set()
    await asyncio.wait_for(closing, PATIENCE_S)
    assert [task.result() for task in waiting] == ["a is done", "b is done", "c is done"]
    with pytest.raises(ShuttingDown):
        await group.submit(gate.decide, "later")
    assert set(await content(memory)) == {"red", "blue", "a", "b", "c"}


async def test_closing_twice_or_before_the_start_does_no_harm(memory: Database) -> None:
    await GroupCommit(memory, ManualClock()).close()
    async with grouping(memory) as group:
        await group.close()


async def test_a_caller_cancelled_while_it_waits_leaves_no_trace(memory: Database) -> None:
    gate = Gate()
    async with grouping(memory, name="cancelled") as group:
        first = gate.hand_in(group, "a")
        await gate.entered.wait()
        waiting = gate.hand_in(group, "b", "c", "d")
        await loop_turns()
        waiting[1].cancel()
        await loop_turns()
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(*first, waiting[0], waiting[2]), PATIENCE_S)
    assert gate.batches == [["a"], ["b", "d"]]
    assert waiting[1].cancelled()
    assert set(await content(memory)) == {"red", "blue", "a", "b", "d"}


async def test_a_batch_whose_callers_are_all_gone_is_not_decided(memory: Database) -> None:
    gate = Gate()
    async with grouping(memory) as group:
        first = gate.hand_in(group, "a")
        await gate.entered.wait()
        waiting = gate.hand_in(group, "b", "c")
        await loop_turns()
        for task in waiting:
            task.cancel()
        await loop_turns()
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(*first), PATIENCE_S)
    assert gate.batches == [["a"]]


async def test_a_caller_cancelled_during_its_batch_spoils_it_for_nobody(memory: Database) -> None:
    gate = Gate()
    async with grouping(memory) as group:
        first, second = gate.hand_in(group, "a", "b")
        await gate.entered.wait()
        first.cancel()
        await loop_turns()
        gate.opened.set()
        assert await asyncio.wait_for(second, PATIENCE_S) == "b is done"
        assert first.cancelled()
    assert {"a", "b"} <= set(await content(memory))


# --- Trouble with the database ----------------------------------------------------------------------------------------


async def test_a_lost_race_is_run_again_with_growing_pauses(memory: Database) -> None:
    clock = EagerClock()
    troubled = Troubled(memory, Conflict("lost"), Unavailable("away"), Conflict("lost"))
    async with grouping(troubled, clock=clock) as group:
        answers = await tell(group, Request("red", 1), Request("red", 2))
    assert answers == [("answer", "1"), ("answer", "3")]
    assert await content(memory) == {"red": 3, "blue": 0}
    assert len(clock.slept) == 3
    assert all(0.01 <= pause <= 2 for pause in clock.slept)


async def test_a_race_that_is_always_lost_reaches_each_caller(memory: Database) -> None:
    troubled = Troubled(memory, *[Conflict("lost")] * 100)
    async with grouping(troubled) as group:
        answers = await tell(group, Request("red", 1), Request("red", 2))
    assert answers == [("Conflict", "lost"), ("Conflict", "lost")]
    assert await content(memory) == {"red": 0, "blue": 0}


async def test_a_conflict_of_one_request_does_not_fail_its_neighbours(memory: Database) -> None:
    gate = Gate(is_open=True)
    async with grouping(memory) as group:
        answers = await asyncio.gather(*gate.hand_in(group, "a", "red", "b"), return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == ["str", "KeyTaken", "str"]
    assert {"a", "b"} <= set(await content(memory))


async def test_a_database_that_stays_away_is_told_to_everyone_after_the_tries(memory: Database) -> None:
    troubled = Troubled(memory, *[Unavailable("away")] * TRIES_MAX)
    async with grouping(troubled) as group:
        answers = await tell(group, *(Request("red", 1) for _ in range(5)))
        assert answers == [("Unavailable", "away")] * 5
        assert troubled.commits == TRIES_MAX
        assert await tell(group, Request("red", 1)) == [("answer", "1")]
    assert await content(memory) == {"red": 1, "blue": 0}


async def test_an_unknown_outcome_is_told_to_every_caller_and_never_tried_again(memory: Database) -> None:
    troubled = Troubled(memory, OutcomeUnknown("who knows"))
    async with grouping(troubled) as group:
        answers = await tell(group, Request("red", 1), Request("red", 20), Request("blue", 2))
    assert answers == [("OutcomeUnknown", "who knows")] * 3
    assert troubled.commits == 1
    assert await content(memory) == {"red": 1, "blue": 2}


async def test_an_unknown_outcome_in_one_part_of_a_split_concerns_only_that_part(memory: Database) -> None:
    # The whole batch, its first half, its second half, the crashing one alone, the last one alone.
    troubled = Troubled(memory, None, None, None, None, OutcomeUnknown("who knows"))
    requests = [Request("red", 1), Request("red", 1), Request("red", 1, crashes=True), Request("blue", 1)]
    async with grouping(troubled) as group:
        answers = await tell(group, *requests)
    assert [kind for kind, _ in answers] == ["answer", "answer", "ValueError", "OutcomeUnknown"]
    assert await content(memory) == {"red": 2, "blue": 1}


async def test_each_caller_of_a_failed_batch_gets_an_error_of_its_own(memory: Database) -> None:
    troubled = Troubled(memory, OutcomeUnknown("who knows"))
    async with grouping(troubled) as group:
        tasks = [asyncio.create_task(group.submit(decide_red, Request("red", 1))) for _ in range(3)]
        errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert len({id(error) for error in errors}) == 3
    assert all(isinstance(error, OutcomeUnknown) and error.__cause__ is not None for error in errors)


# --- The worker must live ---------------------------------------------------------------------------------------------


class Fussy(Unavailable):
    """An error of a user with a constructor of its own."""

    code = "fussy"

    def __init__(self, shop: str, *, hours: int) -> None:
        super().__init__(f"{shop} is closed for {hours} hours")


class Shapeless(Exception):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def cancelled() -> BaseException:
    return asyncio.CancelledError("an inner task was cancelled")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fussy("the shop", hours=3),
        lambda: PublishError("not stored"),
        Shapeless,
        StopAsyncIteration,
        StopIteration,
        TimeoutError,
        cancelled,
    ],
    ids=["fussy", "publish-error", "shapeless", "stop-async-iteration", "stop-iteration", "time-out", "cancelled"],
)
async def test_whatever_a_decide_raises_everyone_is_answered_and_the_next_request_too(
    memory: Database, make: Callable[[], BaseException]
) -> None:
    async def fail(tx: Tx, requests: Sequence[str]) -> list[str]:
        await add(tx, "red", 1)
        raise make()

    gate = Gate(is_open=True)
    group = GroupCommit(memory, EagerClock(), name="alive")
    group.start()
    tasks = [asyncio.create_task(group.submit(fail, name)) for name in ("x", "y")]
    tasks += gate.hand_in(group, "neighbour")
    _, unanswered = await asyncio.wait(tasks, timeout=2)
    tasks += (later := gate.hand_in(group, "later"))
    _, stuck = await asyncio.wait(later, timeout=2)
    closing = asyncio.create_task(group.close())
    await asyncio.wait([closing], timeout=2)
    for task in (*tasks, closing):
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert len(unanswered) == 0, "callers wait forever"
    assert len(stuck) == 0, "the worker is dead: nobody is answered any more"
    assert isinstance(results[0], BaseException)
    assert isinstance(results[1], BaseException)
    assert results[3] == "later is done"
    assert (await content(memory))["red"] == 0
