"""The clocks: who wakes when, and how an instant is written."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.clock import US_PER_S, ManualClock, SystemClock, microseconds, rfc3339
from tests.unit.given import steady

LAST_US = microseconds(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))


async def settle() -> None:
    """Let every task that can run come to its next wait."""
    for _ in range(5):
        await asyncio.sleep(0)


async def sleepers(clock: ManualClock, *seconds: float) -> tuple[list[float], list[asyncio.Task[None]]]:
    """Tasks that sleep so long, and the list in which they note their waking."""
    woken: list[float] = []

    async def sleeper(length: float) -> None:
        await clock.sleep(length)
        woken.append(length)

    tasks = [asyncio.create_task(sleeper(length)) for length in seconds]
    await settle()
    return woken, tasks


async def test_sleepers_wake_in_the_order_of_their_instants() -> None:
    clock = ManualClock()
    woken, _ = await sleepers(clock, 3, 1, 2)

    clock.advance(3)
    await settle()

    assert woken == [1, 2, 3]


async def test_sleepers_of_one_instant_wake_in_the_order_they_lay_down() -> None:
    clock = ManualClock()
    order: list[str] = []

    async def sleeper(name: str) -> None:
        await clock.sleep(1)
        order.append(name)

    tasks = [asyncio.create_task(sleeper(name)) for name in "dbac"]
    await settle()
    clock.advance(1)
    await asyncio.gather(*tasks)

    assert order == list("dbac")


async def test_nobody_wakes_before_the_instant_and_everybody_at_it() -> None:
    clock = ManualClock()
    woken, tasks = await sleepers(clock, 1)

    clock.advance(0.999_999)
    await settle()
    assert woken == []

    clock.advance(0.000_001)
    await settle()
    assert woken == [1]
    assert all(task.done() for task in tasks)


async def test_a_sleep_of_nothing_only_yields() -> None:
    clock = ManualClock()
    woken, _ = await sleepers(clock, 0, -5)
    assert woken == [0, -5]


async def test_a_cancelled_sleeper_does_not_disturb_the_others() -> None:
    clock = ManualClock()
    woken, tasks = await sleepers(clock, 1, 2)

    tasks[0].cancel()
    await settle()
    clock.advance(5)
    await settle()

    assert woken == [2]


async def test_a_jump_of_the_wall_moves_neither_the_monotonic_clock_nor_sleepers() -> None:
    clock = ManualClock(start_us=1_000 * US_PER_S)
    woken, tasks = await sleepers(clock, 10)

    clock.jump_wall(3_600)
    await settle()
    assert (clock.now_us(), clock.monotonic(), woken) == (4_600 * US_PER_S, 0.0, [])

    clock.jump_wall(-7_200)
    clock.advance(10)
    await asyncio.gather(*tasks)
    assert (clock.now_us(), clock.monotonic(), woken) == (-2_590 * US_PER_S, 10.0, [10])


def test_time_cannot_be_wound_back() -> None:
    clock = ManualClock()
    with pytest.raises(ValueError, match="jump_wall"):
        clock.advance(-1)
    assert clock.monotonic() == 0


@steady
@given(steps=st.lists(st.integers(0, 10**9), max_size=20))
def test_both_clocks_advance_by_the_same_microseconds(steps: list[int]) -> None:
    clock = ManualClock(start_us=0)
    for step_us in steps:
        clock.advance(step_us / US_PER_S)
    assert clock.now_us() == sum(steps)
    assert clock.monotonic() == sum(steps) / US_PER_S


async def test_the_system_clock_grows_and_its_sleep_returns() -> None:
    clock = SystemClock()
    wall, steady_s = clock.now_us(), clock.monotonic()
    await clock.sleep(0.001)
    await clock.sleep(-1)
    assert clock.monotonic() > steady_s
    assert abs((clock.now_us() - wall) / US_PER_S - (clock.monotonic() - steady_s)) < 60


@steady
@given(instant_us=st.integers(0, LAST_US))
def test_an_instant_survives_being_written_and_read(instant_us: int) -> None:
    written = rfc3339(instant_us)
    assert written.endswith("Z")
    assert microseconds(datetime.fromisoformat(written)) == instant_us


@steady
@given(one=st.integers(0, LAST_US), other=st.integers(0, LAST_US))
def test_written_instants_sort_like_instants(one: int, other: int) -> None:
    assert (rfc3339(one) < rfc3339(other)) == (one < other)


@steady
@given(instant_us=st.integers(86_400 * US_PER_S, LAST_US - 86_400 * US_PER_S), offset=st.integers(-23 * 60, 23 * 60))
def test_the_zone_of_a_datetime_does_not_matter(instant_us: int, offset: int) -> None:
    zone = timezone(timedelta(minutes=offset))
    instant = datetime.fromisoformat(rfc3339(instant_us)).astimezone(zone)
    assert microseconds(instant) == instant_us


def test_instants_are_written_as_rfc_3339() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000000Z"
    assert rfc3339(1_769_848_200_000_001) == "2026-01-31T08:30:00.000001Z"


def test_a_datetime_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a zone"):
        microseconds(datetime(2026, 1, 31))  # noqa: DTZ001  # the case itself
