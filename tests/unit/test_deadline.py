"""Deadlines that share timers end as `asyncio.timeout` does: not early, only what is still running, and never twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from holdfast.deadline import EXACT_BELOW_S, TICK_S, Deadlines

PATIENCE_S = 20
NEVER_S = 3_600.0


@pytest.fixture
def deadlines() -> Deadlines:
    return Deadlines(exact_below_s=0)


async def for_ever() -> None:
    await asyncio.Event().wait()


async def limited(deadlines: Deadlines, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    async with deadlines.within(seconds):
        await work()


async def test_what_is_still_running_is_ended_with_timeout_error_and_not_before_its_time(deadlines: Deadlines) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await limited(deadlines, 0.02, for_ever)
    assert loop.time() - begun >= 0.02
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0  # the cancellation was ours and is taken back


async def test_what_was_done_in_time_is_left_alone_when_its_timer_comes(deadlines: Deadlines) -> None:
    came = asyncio.Event()

    async def other() -> None:
        try:
            await limited(deadlines, TICK_S / 2, for_ever)
        except TimeoutError:
            came.set()

    async def nothing() -> None:
        return None

    await limited(deadlines, TICK_S / 2, nothing)
    task = asyncio.create_task(other())
    await asyncio.wait_for(came.wait(), PATIENCE_S)  # by then every timer of that time has come
    await task


async def test_many_share_one_timer_and_each_is_ended(deadlines: Deadlines, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: 1_000.0)
    timers: list[tuple[float, Callable[..., None], int]] = []
    monkeypatch.setattr(loop, "call_at", lambda at, expire, tick: timers.append((at, expire, tick)))
    tasks = [asyncio.create_task(limited(deadlines, 10.001 + at / 10_000, for_ever)) for at in range(100)]
    await asyncio.sleep(0)
    monkeypatch.undo()
    ((at, expire, tick),) = timers
    assert 1_010.0109 <= at <= 1_010.001 + TICK_S
    expire(tick)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TimeoutError] * 100


async def test_a_cancellation_from_elsewhere_stays_one(deadlines: Deadlines) -> None:
    task = asyncio.create_task(limited(deadlines, NEVER_S, for_ever))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_from_elsewhere_and_ended_at_once_is_cancelled(deadlines: Deadlines) -> None:
    limit = deadlines.within(NEVER_S)

    async def work() -> None:
        async with limit:
            await for_ever()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    limit.expire()  # type: ignore[union-attr]  # not one of asyncio's
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def test_an_error_of_the_block_is_raised_as_it_is(deadlines: Deadlines) -> None:
    async def fails() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await limited(deadlines, NEVER_S, fails)


def test_a_new_loop_has_timers_of_its_own(deadlines: Deadlines) -> None:
    async def ends() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await limited(deadlines, 0.01, for_ever)

    asyncio.run(ends())
    asyncio.run(ends())


async def test_a_short_deadline_has_a_timer_of_its_own() -> None:
    deadlines = Deadlines()
    assert isinstance(deadlines.within(EXACT_BELOW_S / 2), asyncio.Timeout)
    assert not isinstance(deadlines.within(EXACT_BELOW_S), asyncio.Timeout)
