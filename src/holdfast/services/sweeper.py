"""Sweeper: a guard that looks at fixed intervals for what no message came for; it is never the only timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from holdfast import observe
from holdfast.clock import Clock
from holdfast.errors import HoldfastError

log = observe.logger("sweeper")


class Sweeper:
    """Calls `work` every `every_ms`; it answers how much it found to do."""

    def __init__(self, name: str, every_ms: int, work: Callable[[], Awaitable[int]], clock: Clock) -> None:
        self._name = name
        self._every_s = every_ms / 1_000
        self._work = work
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"sweeper-{self._name}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(self._every_s)
            try:
                found = await self._work()
            except HoldfastError as error:
                log.warning("sweep_failed", sweeper=self._name, error=error.code, detail=error.detail)
            except Exception:
                log.exception("sweep_failed", sweeper=self._name)  # the guard must outlive any single failure
            else:
                if found:
                    log.info("swept", sweeper=self._name, found=found)
