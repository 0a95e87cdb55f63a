"""A shop under load that is hit by faults, again and again, and must still keep every promise."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.faults.book import violations
from tests.faults.conftest import Scenario
from tests.faults.crowd import SHELVES, Crowd, History, connected, stock_up
from tests.faults.processes import Place, Shop

ORDERS_BETWEEN = 30  # so many orders are acknowledged before each fault and after the last one
MOMENT_S = 1.0  # the fault strikes at a random moment within so long after that

Fault = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Scene:
    """A shop and its processes; the first of them is the API that the crowd asks."""

    shop: Shop
    places: Sequence[Place]
    chance: random.Random

    async def open(self) -> None:
        """Migrate and start everything."""
        await self.shop.migrate()
        await asyncio.gather(*(place.start() for place in self.places))

    async def kill_one(self) -> None:
        """`kill -9` a process at random and start it again; sometimes the new one is killed while it starts."""
        victim = self.chance.choice(self.places)
        victim.kill()
        if self.chance.random() < 0.25:
            born = victim.spawn()
            await asyncio.sleep(self.chance.uniform(0.0, 1.5))
            born.kill()
        await victim.start()


async def torment(scene: Scene, fault: Fault, times: int, scenario: Scenario) -> None:
    """Let a crowd buy, strike so many times in the middle of it, let everything settle, and judge."""
    await scene.open()
    history = History()
    async with connected(scene.places[0].port, history) as client:
        await stock_up(client, SHELVES)
        crowd = Crowd(client, history, scenario.seed)
        async with crowd.buying():
            for _ in range(times):
                await crowd.progress(ORDERS_BETWEEN)
                await asyncio.sleep(scene.chance.uniform(0.0, MOMENT_S))
                struck = time.monotonic()
                await fault()
                await crowd.progress(1)
                scenario.back_s = max(scenario.back_s, time.monotonic() - struck)
            await crowd.progress(ORDERS_BETWEEN)
        scenario.judge(times, history, await violations(scene.shop, client, history))
