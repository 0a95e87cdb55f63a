"""Nothing is sent into the operator's own network: neither when a webhook is made nor at any attempt."""

from __future__ import annotations

import msgspec
import pytest

from holdfast.services.webhooks.model import EndpointChange, ForbiddenUrl, NewEndpoint
from holdfast.settings import Settings, WebhooksSettings
from tests.conftest import StartSystem
from tests.flow.test_webhooks import at_home, become, deliveries, happen
from tests.receiver import receiving
from tests.unit.test_webhooks import PUBLIC, Names


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://169.254.169.254/latest/",
        "https://localhost/",
        "https://10.1.2.3/",
    ],
)
async def test_a_webhook_to_a_private_address_is_not_made(start_system: StartSystem, url: str) -> None:
    system = await start_system(work=False)
    with pytest.raises(ForbiddenUrl):
        await system.webhooks.add(NewEndpoint(url=url))
    assert await system.webhooks.every() == []


async def test_a_name_that_turns_private_after_it_was_registered_gets_nothing(
    start_system: StartSystem, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving() as receiver:
        system = await start_system(at_home(settings, allow_private=False))
        names = Names(monkeypatch, [PUBLIC], ["127.0.0.1"])
        endpoint = await system.webhooks.add(NewEndpoint(url=receiver.url("/hook", "rebinding.example")))
        assert names.asked == ["rebinding.example"]
        await happen(system, 1)
        await become(system, endpoint, ("pending", 1))
        (one,) = await deliveries(system, endpoint)
        assert names.asked == ["rebinding.example"] * 2
        assert receiver.got == []
        assert one.last_status is None
        assert (one.last_error or "").startswith("ForbiddenUrl")
        with pytest.raises(ForbiddenUrl):
            await system.webhooks.change(int(endpoint.id), EndpointChange(url=receiver.url("/x", "rebinding.example")))


async def test_a_url_without_tls_gets_nothing_once_that_is_forbidden(
    start_system: StartSystem, settings: Settings
) -> None:
    async with receiving() as receiver:
        before = await start_system(at_home(settings), work=False)
        endpoint = await before.webhooks.add(NewEndpoint(url=receiver.url()))
        await before.stop_work()
        if before.transport.features.several_processes:
            strict = WebhooksSettings(allow_private=True)
            system = await start_system(msgspec.structs.replace(settings, webhooks=strict))
            await happen(system, 1)
            await become(system, endpoint, ("pending", 1))
            (one,) = await deliveries(system, endpoint)
            assert (one.last_error or "").startswith("ForbiddenUrl")
            assert receiver.got == []
