"""Time-ordered 64-bit ids for rows, and message ids."""

from __future__ import annotations

import os
import secrets
import threading

from holdfast.clock import Clock

EPOCH_MS = 1_735_689_600_000  # 2025-01-01T00:00:00Z: 41 bits of milliseconds last until 2094
SEQUENCE_BITS = 12
NODE_BITS = 10
ID_MAX = 2**63 - 1

_SEQUENCE_COUNT = 1 << SEQUENCE_BITS
_NODE_COUNT = 1 << NODE_BITS
_SCATTER_BITS = SEQUENCE_BITS + NODE_BITS


def created_ms(row_id: int) -> int:
    """The millisecond since 1970 in which an id was drawn, by the clock of its source."""
    return (row_id >> _SCATTER_BITS) + EPOCH_MS


class IdSource:
    """Positive 64-bit integers that grow with time: 41 bits milliseconds, 12 bits sequence, 10 bits node.

    Within one source ids are unique and strictly increasing, also when the wall clock steps back (the last
    millisecond is then kept). The node is drawn at random for each source, so two processes collide only if they
    drew the same node and used the same millisecond and sequence; every table that stores an id has a unique key,
    a collision is therefore a refused insert (`Conflict`, run again with new ids) and never a mixed-up row.
    """

    def __init__(self, clock: Clock, node: int | None = None) -> None:
        if node is not None and not 0 <= node < _NODE_COUNT:
            raise ValueError(f"node must be in 0..{_NODE_COUNT - 1}, not {node}")
        self._clock = clock
        self._node = secrets.randbelow(_NODE_COUNT) if node is None else node
        self._last_ms = 0
        self._sequence = 0

    def next(self) -> int:
        """One new id."""
        now_ms = self._clock.now_us() // 1_000 - EPOCH_MS
        if now_ms > self._last_ms:
            self._last_ms = now_ms
            self._sequence = secrets.randbelow(64)  # a random start spreads sources that drew the same node
        else:
            self._sequence += 1
            if self._sequence >= _SEQUENCE_COUNT:
                self._last_ms += 1  # borrow from the future instead of waiting
                self._sequence = 0
        return (self._last_ms << (SEQUENCE_BITS + NODE_BITS)) | (self._sequence << NODE_BITS) | self._node

    def message_id(self) -> str:
        """One new message id: an id in hexadecimal followed by 64 random bits, unique across all producers."""
        return f"{self.next():016x}{os.urandom(8).hex()}"


class SharedIdSource(IdSource):
    """Ids for callers on several threads, next to many processes: below the milliseconds all 22 bits are random.

    Unique and strictly increasing within one source, as with any. Two sources that give an id in the same millisecond
    collide once in 2 million times, where nodes drawn for a lifetime would collide again and again: a collision
    refuses the caller's own transaction, which nobody but him can run again.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        now_ms = self._clock.now_us() // 1_000 - EPOCH_MS
        scattered = (now_ms << _SCATTER_BITS) | secrets.randbelow(1 << (_SCATTER_BITS - 1))
        with self._lock:
            self._last = max(scattered, self._last + 1 + secrets.randbelow(_NODE_COUNT))
            return self._last
