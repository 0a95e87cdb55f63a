"""A waiter's sleep: what is told while it looks shortens the sleep, and wakes it no sooner than it has to."""

from __future__ import annotations

import asyncio

from holdfast.clock import US_PER_S, ManualClock
from holdfast.messaging.transports.sql.wakeups import Waiter

NOON_US = 1_800_000_000 * US_PER_S


async def slept(waiter: Waiter, until_us: int) -> asyncio.Task[None]:
    """Begin to sleep, and let what can end it at once end it."""
    task = asyncio.create_task(waiter.sleep(until_us))
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def test_what_is_due_later_is_no_reason_to_look_again_at_once() -> None:
    clock = ManualClock(NOON_US)
    waiter = Waiter(clock)
    waiter.begin()
    waiter.tell(NOON_US + 3_600 * US_PER_S)
    task = await slept(waiter, NOON_US + US_PER_S)
    assert not task.done()
    clock.advance(1.0)
    await task


async def test_what_is_due_before_the_end_of_the_sleep_shortens_it() -> None:
    clock = ManualClock(NOON_US)
    waiter = Waiter(clock)
    waiter.begin()
    waiter.tell(NOON_US + US_PER_S)
    task = await slept(waiter, NOON_US + 10 * US_PER_S)
    assert not task.done()
    clock.advance(1.0)
    await task


async def test_what_is_due_now_ends_the_sleep_at_once_whenever_it_is_told() -> None:
    clock = ManualClock(NOON_US)
    waiter = Waiter(clock)
    waiter.begin()
    waiter.tell(NOON_US)
    assert (await slept(waiter, NOON_US + US_PER_S)).done()
    waiter.begin()
    task = await slept(waiter, NOON_US + US_PER_S)
    assert not task.done()
    waiter.tell(NOON_US)
    await task
