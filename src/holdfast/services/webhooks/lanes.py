"""Lanes: for each endpoint a few senders of its own, so that a slow one holds up nobody else."""

from __future__ import annotations

import asyncio

from holdfast import observe
from holdfast.clock import US_PER_S, Clock
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import HoldfastError
from holdfast.services.webhooks.actions import Job, Webhooks
from holdfast.services.webhooks.model import Answer, Attempt, ForbiddenUrl, target_of
from holdfast.services.webhooks.needs import Wire
from holdfast.settings import WebhooksSettings
from holdfast.webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER

log = observe.logger("webhooks")


class Lanes:
    """Sends what is due. A lane works until nothing of its endpoint is due any more; whoever wakes it need not wait.

    What a process had under way when it died is due again when its time is over. There are at most `endpoints_max`
    lanes with `at_once` senders each.
    """

    def __init__(
        self, group: GroupCommit, webhooks: Webhooks, wire: Wire, clock: Clock, settings: WebhooksSettings
    ) -> None:
        self._group = group
        self._webhooks = webhooks
        self._wire = wire
        self._clock = clock
        self._settings = settings
        self._senders: dict[int, set[asyncio.Task[None]]] = {}
        self._again: set[int] = set()
        self._closing = False

    def wake(self, endpoint_id: int) -> None:
        """See to what is due for an endpoint, with one sender more if there is room."""
        if self._closing:
            return
        senders = self._senders.setdefault(endpoint_id, set())
        if len(senders) >= self._settings.at_once:
            self._again.add(endpoint_id)  # each of them may be past its last look
            return
        sender = asyncio.create_task(self._send_all(endpoint_id), name=f"webhook-{endpoint_id}")
        senders.add(sender)
        sender.add_done_callback(lambda ended: self._ended(endpoint_id, ended))

    async def stop(self, within_s: float) -> None:
        """Let the attempts under way end, cut off those that take longer; they are made again later."""
        self._closing = True
        tasks = [task for senders in self._senders.values() for task in senders]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=within_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    def _ended(self, endpoint_id: int, sender: asyncio.Task[None]) -> None:
        senders = self._senders[endpoint_id]
        senders.discard(sender)
        if not senders:
            del self._senders[endpoint_id]
            self._again.discard(endpoint_id)

    async def _send_all(self, endpoint_id: int) -> None:
        try:
            while not self._closing:
                self._again.discard(endpoint_id)
                job = await self._group.submit(self._webhooks.claim, endpoint_id)
                if job is not None:
                    self.wake(endpoint_id)  # there may be more: grow by one for each that was found
                    await self._send(job)
                elif endpoint_id not in self._again:
                    return
        except HoldfastError as error:
            log.warning("webhook_lane_failed", endpoint_id=endpoint_id, error=error.code, detail=error.detail)
        except Exception:
            log.exception("webhook_lane_failed", endpoint_id=endpoint_id)  # the sweeper starts it anew

    async def _send(self, job: Job) -> None:
        now_us = self._clock.now_us()
        delivery = job.delivery
        headers = {
            "content-type": "application/json",
            "user-agent": "holdfast",
            ID_HEADER: delivery.message_id,
            TIMESTAMP_HEADER: str(now_us // US_PER_S),
            SIGNATURE_HEADER: job.endpoint.signatures(delivery.message_id, now_us, delivery.body),
        }
        try:
            target = target_of(job.endpoint.url, allow_http=self._settings.allow_http)  # the setting may have changed
        except ForbiddenUrl as error:
            answer = Answer(error=f"ForbiddenUrl: {error.detail}")
        else:
            answer = await self._wire.post(target, headers, delivery.body)
        tried = Attempt(delivery=delivery, at_us=now_us, answer=answer)
        await self._group.submit(self._webhooks.settle, tried)
