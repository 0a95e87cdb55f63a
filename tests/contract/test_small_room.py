"""Goes to tests/contract/test_prefetch.py: the last quarter of a large prefetch."""

from __future__ import annotations

import asyncio

from holdfast.messaging.injection import Incoming
from tests.conftest import StartSystem, eventually
from tests.contract.notes import counts_become, note, office, plainly, publish


async def test_who_waits_for_as_many_as_the_prefetch_allows_gets_them(start_system: StartSystem) -> None:
    """A quarter that is free for long is used too: what is held may wait for just those messages."""
    system = await office(start_system)
    got: list[str] = []
    full = asyncio.Event()

    async def handle(incoming: Incoming) -> None:
        got.append(incoming.body.text)
        if len(got) == 60:
            full.set()
        await full.wait()

    async def has(count: int) -> None:
        async def reached() -> bool:
            return len(got) == count

        await eventually(reached, f"{count} have begun", 5)

    system.listen(plainly(handle, prefetch=60, concurrency=60))
    await publish(system, [note(system, str(number)) for number in range(50)])
    await has(50)
    await publish(system, [note(system, str(number)) for number in range(10)])
    await has(60)
    await counts_become(system, (0, 0, 0))
