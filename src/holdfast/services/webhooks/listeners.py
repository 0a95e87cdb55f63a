"""Webhooks' listener: a wake-up starts the lane of its endpoint."""

from __future__ import annotations

from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import WebhookDue
from holdfast.services.webhooks.service import WebhookService


def listeners(service: WebhookService) -> list[Listen]:
    """The message is done with at once: what is due stands in the rows, and the sweeper looks at them too."""

    async def on_due(incoming: Incoming) -> None:
        service.wake(incoming.body.endpoint_id)

    return [Listen(name="webhooks.send", queue=topology.WEBHOOK_QUEUE, plain={WebhookDue: on_due})]
