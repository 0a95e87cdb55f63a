"""What every queue is asked to carry, and what each has to be able to do."""

from __future__ import annotations

from typing import Protocol

import msgspec

BATCH = 100
TEXT = "x" * 100


class Note(msgspec.Struct, frozen=True):
    """The body of every message: about 130 bytes as JSON."""

    number: int
    text: str


class Seen:
    """What the handlers saw; checked at the end, so that nobody is fast by losing messages."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0

    def note(self, number: int) -> None:
        self.count += 1
        self.total += number

    def refuse_unless_all(self, count: int) -> None:
        """Raise unless the numbers 0 to `count` - 1 were seen, each once."""
        if (self.count, self.total) != (count, count * (count - 1) // 2):
            raise RuntimeError(f"{self.count} messages handled with the sum {self.total}; {count} were sent")


class Queue(Protocol):
    """One system on one database, opened and empty."""

    async def put_single(self, first: int, count: int) -> None:
        """Send messages with the numbers from `first`, one a call, by as many callers at once as suits it best."""
        ...

    async def put_batches(self, first: int, count: int) -> None:
        """The same, `BATCH` a call; raises `NotImplementedError` where there is no such call."""
        ...

    async def drain(self, count: int, seen: Seen) -> None:
        """Hand `count` waiting messages to a handler that notes them, and settle them all."""
        ...

    async def close(self) -> None: ...
