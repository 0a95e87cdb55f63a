"""What webhooks ask of others: names to be resolved, and a request to be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from holdfast.services.webhooks.model import Answer, Target


class Resolver(Protocol):
    """Finds the addresses that may be connected to."""

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """The host's IP addresses, all allowed; raises `ForbiddenUrl` when one is not, `OSError` without any."""
        ...


class Wire(Protocol):
    """Sends one request."""

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Post a body and take the answer, within a deadline; what goes wrong is in the answer, never raised."""
        ...
