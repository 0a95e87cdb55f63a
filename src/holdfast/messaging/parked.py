"""What the error store tells: groups of failures, one message in short and in full, and what was done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

State = Literal["parked", "pending", "done", "discarded"]
STATES: tuple[State, ...] = ("parked", "pending", "done", "discarded")
OPEN: tuple[State, ...] = ("parked", "pending")
"""The states that still need somebody or something."""


class FailureGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Open messages of one queue that failed in the same way; error, type and reason are those of the newest one."""

    group: str
    queue: str
    error: str
    type: str
    parked: int
    pending: int
    loops_max: int
    first_us: int
    last_us: int
    reason: str

    @property
    def count(self) -> int:
        return self.parked + self.pending


class ParkedSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the error store in short. Instants in microseconds since the epoch."""

    id: int
    state: State
    queue: str
    group: str
    error: str
    message_id: str
    exchange: str
    routing_key: str
    type: str
    content_type: str
    attempt: int
    deliveries: int
    loops: int
    published_us: int
    parked_us: int
    failed_us: int
    reason: str


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the audit; before and after are there for what was edited."""

    at_us: int
    actor: str
    action: str
    reason: str
    headers_before: Mapping[str, str] | None = None
    headers_after: Mapping[str, str] | None = None
    body_before: bytes | None = None
    body_after: bytes | None = None


class ParkedMessage(ParkedSummary, frozen=True, kw_only=True):
    """One message of the error store in full."""

    headers: Mapping[str, str]
    body: bytes
    audit: tuple[AuditEntry, ...]

    @property
    def error_headers(self) -> Mapping[str, str]:
        """The failure under the header names that Spring's error queues use."""
        return {
            "x-original-exchange": self.exchange,
            "x-original-routingKey": self.routing_key,
            "x-exception-message": self.reason.partition("\n")[0],
            "x-exception-stacktrace": self.reason.partition("\n")[2],
        }


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Which messages were moved, and, of those asked for by id, which were left alone with the state they are in."""

    ids: tuple[int, ...]
    left: Mapping[int, State] = {}

    @property
    def count(self) -> int:
        return len(self.ids)
