"""Pacing: how many handlers run at once, in which order, and how carefully while everything fails."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class Slots:
    """A semaphore whose size may change while it is in use; a smaller size takes effect as holders leave."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        return self._size

    def resize(self, size: int) -> None:
        """Let so many in at once from now on."""
        self._size = size
        self._let_in()

    async def __aenter__(self) -> None:
        if self._used < self._size and not self._waiting:
            self._used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._used -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._used < self._size and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                self._used += 1
                turn.set_result(None)


class Keys:
    """One at a time for each key, in the order in which they asked; different keys run side by side."""

    def __init__(self) -> None:
        self._last: dict[Hashable, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def turn(self, key: Hashable | None) -> AsyncIterator[None]:
        """Wait for all who asked before with this key; None waits for nobody."""
        if key is None:
            yield
            return
        before = self._last.get(key)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last[key] = mine
        try:
            if before is not None:
                await asyncio.shield(before)
            yield
        finally:
            if before is None or before.done():
                self._pass_on(key, mine)
            else:  # cancelled while waiting: whoever comes after us waits for whom we waited for
                before.add_done_callback(lambda _: self._pass_on(key, mine))

    def _pass_on(self, key: Hashable, mine: asyncio.Future[None]) -> None:
        mine.set_result(None)
        if self._last.get(key) is mine:
            del self._last[key]


class Outage:
    """Counts failures in a row, of any message: a neighbour that is away fails them all.

    After `after` of them in a row deliveries are tried one at a time, each failure followed by a wait of `wait_s`, so
    that a backlog is not burnt through its retries; the first success restores full speed.

    A message that failed before says little by failing again: once something has worked, only messages that fail for
    the first time count, or a handful of poisonous ones that are tried again among themselves would slow all down.
    """

    def __init__(self, after: int, wait_s: float) -> None:
        self._after = after
        self.wait_s = wait_s
        self.failures = 0
        self.one_at_a_time = asyncio.Lock()
        self._has_worked = False

    @property
    def on(self) -> bool:
        return self.failures >= self._after

    def failed(self, *, again: bool) -> None:
        """A handler failed; `again` when it did so with this message before."""
        if not (again and self._has_worked):
            self.failures += 1

    def worked(self) -> None:
        self.failures = 0
        self._has_worked = True
