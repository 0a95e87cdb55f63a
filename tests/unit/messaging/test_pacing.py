"""Slots that change size, turns by key, and the count of failures in a row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from holdfast.messaging.pacing import Keys, Outage, Slots


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


Enter = Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]]


class Work:
    """Tasks that enter, wait until told, and leave; notes who is inside."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}

    def start(
        self, name: str, enter: Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]]
    ) -> asyncio.Task[None]:
        gate = self._gates[name] = asyncio.Event()

        async def body() -> None:
            self.inside.append(name)
            try:
                await gate.wait()
            finally:
                self.inside.remove(name)

        async def run() -> None:
            await enter(name, body)

        return asyncio.create_task(run())

    async def finish(self, name: str) -> None:
        self._gates[name].set()
        await settle()


async def test_slots_let_in_as_many_as_their_size_and_follow_its_changes() -> None:
    slots, work = Slots(2), Work()

    async def enter(_: str, body: Callable[[], Awaitable[None]]) -> None:
        async with slots:
            await body()

    tasks = [work.start(name, enter) for name in "abcde"]
    await settle()
    assert work.inside == ["a", "b"]
    slots.resize(3)
    await settle()
    assert work.inside == ["a", "b", "c"]
    slots.resize(1)
    await work.finish("a")
    await work.finish("b")
    assert work.inside == ["c"]
    tasks[3].cancel()  # it waits, and must not take a place with it
    await work.finish("c")
    assert work.inside == ["e"]
    await work.finish("e")
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(1), slots:
        assert slots.size == 1


async def test_one_that_is_cancelled_just_as_its_turn_comes_leaves_its_place() -> None:
    slots = Slots(1)
    await slots.__aenter__()
    waiting = asyncio.create_task(slots.__aenter__())
    await settle()
    await slots.__aexit__(None, None, None)  # its turn has come, and it does not know yet
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(1), slots:
        pass


async def test_one_key_is_one_at_a_time_in_order_and_keys_do_not_wait_for_each_other() -> None:
    keys, work = Keys(), Work()

    async def enter(name: str, body: Callable[[], Awaitable[None]]) -> None:
        async with keys.turn(name[0] if name[0] != "-" else None):
            await body()

    tasks = [work.start(name, enter) for name in ("a1", "a2", "b1", "-1", "-2", "a3")]
    await settle()
    assert work.inside == ["a1", "b1", "-1", "-2"]
    await work.finish("a1")
    assert work.inside == ["b1", "-1", "-2", "a2"]
    await work.finish("a2")
    assert "a3" in work.inside
    for name in ("b1", "-1", "-2", "a3"):
        await work.finish(name)
    await asyncio.gather(*tasks)
    assert keys._last == {}


async def test_one_that_is_cancelled_while_waiting_lets_nobody_past() -> None:
    keys, work = Keys(), Work()

    async def enter(_: str, body: Callable[[], Awaitable[None]]) -> None:
        async with keys.turn("key"):
            await body()

    first, second, third = (work.start(name, enter) for name in ("1", "2", "3"))
    await settle()
    second.cancel()
    await settle()
    assert work.inside == ["1"]
    await work.finish("1")
    assert work.inside == ["3"]
    await work.finish("3")
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert keys._last == {}


async def test_a_failure_inside_passes_the_turn_on() -> None:
    keys = Keys()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(1), keys.turn("key"):
                raise ZeroDivisionError
    assert keys._last == {}


def test_an_outage_is_so_many_failures_in_a_row_and_ends_with_the_first_success() -> None:
    outage = Outage(3, 1.0)
    seen = []
    for failed in (True, True, False, True, True, True, False):
        if failed:
            outage.failed(again=False)
        else:
            outage.worked()
        seen.append(outage.on)
    assert seen == [False, False, False, False, False, True, False]


def test_what_failed_before_is_no_sign_of_an_outage_once_something_has_worked() -> None:
    outage = Outage(3, 1.0)
    for _ in range(3):
        outage.failed(again=True)
    assert outage.on  # nothing has ever worked: the neighbour may have been away all the time
    outage.worked()
    for _ in range(9):
        outage.failed(again=True)
    assert (outage.on, outage.failures) == (False, 0)
    for _ in range(3):
        outage.failed(again=False)
    assert outage.on
