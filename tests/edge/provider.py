"""A sandbox provider in a server of its own, for a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec

from holdfast.clock import Clock, SystemClock
from holdfast.edge.sandbox_provider import Given, ProviderServer, providing
from holdfast.edge.server import listening_on
from holdfast.settings import HttpSettings, Settings
from tests.conftest import quick_settings

NOWHERE = "http://127.0.0.1:9/v1/notices/sandbox"  # nobody listens on the port of `discard`


class ProviderDesk:
    """A served sandbox provider, and the means to talk to it."""

    def __init__(self, server: ProviderServer, url: str, client: httpx.AsyncClient) -> None:
        self.server = server
        self.url = url
        self.client = client

    async def faults(self, **faults: object) -> None:
        """Order what goes wrong from now on."""
        answer = await self.client.post("/control/faults", json=faults)
        assert answer.status_code == 200, answer.text

    async def pay(self, pay_url: str | None) -> str:
        """The buyer presses the button; answers the page that he sees then."""
        assert pay_url is not None
        answer = await self.client.post(pay_url)
        assert answer.status_code == 200, answer.text
        return answer.text


@asynccontextmanager
async def provider_at(clock: Clock, *, port: int = 0, book_url: str = "sqlite://") -> AsyncIterator[ProviderDesk]:
    """Serve a sandbox provider of the quick settings' secret, on a free port unless told which."""
    payments = quick_settings("sqlite://").payments
    given = Given(
        secret=payments.sandbox_secret, merchant_id=payments.merchant_id, notify_url=NOWHERE, book_url=book_url
    )
    async with (
        providing(clock, given) as server,
        listening_on(server.app, HttpSettings(port=port), SystemClock(), 1) as url,
        httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client,
    ):
        yield ProviderDesk(server, url, client)


def asking(settings: Settings, url: str, **changes: int) -> Settings:
    """The settings of a shop whose provider is that server; a lost answer costs little time."""
    payments = msgspec.structs.replace(settings.payments, sandbox_url=url, **({"call_timeout_ms": 300} | changes))
    return msgspec.structs.replace(settings, payments=payments)
