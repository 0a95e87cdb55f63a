"""RetryPolicy: a pure answer to "what now?" after a failure; it waits for nobody and knows no clock."""

from __future__ import annotations

import random

import msgspec

from holdfast.errors import CannotDecode, HoldfastError, InvalidInput


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often and after how long something that failed is tried again.

    `tries` counts all attempts, the first included. The wait before attempt n + 1 is
    `interval_ms * multiplier ** (n - 1)`, at most `interval_ms_max`, drawn down by up to `jitter` (a share, 0 to 1) so
    that many failures at once do not come back at once.
    """

    tries: int = 3
    interval_ms: int = 1_000
    multiplier: float = 1.0
    interval_ms_max: int = 300_000
    jitter: float = 0.0
    fatal: tuple[type[BaseException], ...] = ()  # besides `FATAL`: errors that another attempt cannot mend

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InvalidInput(f"tries counts the first attempt too, so it is at least 1, not {self.tries}")
        for name in ("interval_ms", "interval_ms_max", "multiplier"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} must not be below zero, it is {getattr(self, name)}")
        if not 0 <= self.jitter <= 1:
            raise InvalidInput(f"jitter is a share from 0 to 1, not {self.jitter}")

    def delay_ms(self, attempt: int, error: BaseException, chance: random.Random) -> int | None:
        """Milliseconds to wait after failed attempt number `attempt` (from 1), or None to give up."""
        if attempt >= self.tries or is_fatal(error, self.fatal):
            return None
        return round(self.wait_ms(attempt) * (1 - self.jitter * chance.random()))

    def wait_ms(self, attempt: int) -> int:
        """The wait after failed attempt number `attempt` (from 1), without jitter."""
        try:
            return round(min(self.interval_ms * self.multiplier ** (attempt - 1), self.interval_ms_max))
        except OverflowError:  # so many attempts that the cap was reached long ago
            return self.interval_ms_max


NO_RETRY = RetryPolicy(tries=1)
"""One try. As a listener's `local` policy it makes the retries stateful: each is a redelivery, and the count is stored
with the message. As its `durable` policy it leaves the stateless ones: all within one delivery."""


class Retry(HoldfastError):
    """A handler's signal: not now, deliver again after `after_ms` milliseconds; does not count as a failure."""

    code = "retry"
    retryable = True

    def __init__(self, after_ms: int, reason: str = "") -> None:
        super().__init__(reason or "the handler asked for another delivery later")
        self.after_ms = after_ms


class Reject(HoldfastError):
    """A handler's signal: no retry can help, hand this message to the recoverer with the reason."""

    code = "reject"


FATAL = (CannotDecode, InvalidInput, Reject)
"""Errors that another attempt cannot mend."""


def is_fatal(error: BaseException, more: tuple[type[BaseException], ...] = ()) -> bool:
    """Whether trying again is pointless."""
    return isinstance(error, (*FATAL, *more))
