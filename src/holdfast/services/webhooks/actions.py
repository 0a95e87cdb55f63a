"""Verbs of webhooks: keep endpoints, fan events out, claim a delivery, settle an attempt, replay, clear away."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock, rfc3339
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import WebhookDue
from holdfast.services.contracts.feed import Happened
from holdfast.services.webhooks import store
from holdfast.services.webhooks.model import (
    CANCELLED,
    DONE,
    FAILED,
    GONE,
    PENDING,
    Attempt,
    Delivery,
    Endpoint,
    EndpointChange,
    NewEndpoint,
    TooManyWebhooks,
    WebhookExists,
    WebhookNotFound,
    next_try_us,
)
from holdfast.settings import Secret, WebhooksSettings
from holdfast.webhooks import new_secret

GRACE_MS = 15_000  # over the deadline of an attempt: then whoever made it is taken for dead
REMOVE_PAGE = 500

log = observe.logger("webhooks")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to change an endpoint."""

    endpoint_id: int
    changed: EndpointChange


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to send again: one delivery, or all that failed since an instant."""

    endpoint_id: int
    delivery_id: int | None = None
    failed_since_us: int = 0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery to be sent now, and where to."""

    endpoint: Endpoint
    delivery: Delivery


class Webhooks:
    """What webhooks can do; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(
        self, clock: Clock, ids: IdSource, outbox: Outbox, settings: WebhooksSettings, chance: random.Random
    ) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox
        self._settings = settings
        self._chance = chance

    async def add(self, tx: Tx, wishes: Sequence[NewEndpoint]) -> list[Endpoint | HoldfastError]:
        """Add endpoints, one for each URL; answers `WebhookExists` or `TooManyWebhooks`."""
        answers: list[Endpoint | HoldfastError] = []
        urls = {each.url for each in await store.all_endpoints(tx)}
        for wish in wishes:
            if wish.url in urls:
                answers.append(WebhookExists())
            elif len(urls) >= self._settings.endpoints_max:
                answers.append(TooManyWebhooks())
            else:
                endpoint = self._new(wish)
                await store.insert_endpoint(tx, endpoint)
                urls.add(wish.url)
                answers.append(endpoint)
        return answers

    async def change(self, tx: Tx, wishes: Sequence[Change]) -> list[Endpoint | HoldfastError]:
        """Change endpoints; one that is enabled again goes on where it stopped.

        Answers `WebhookNotFound`, or `WebhookExists` for the URL of another.
        """
        answers: dict[int, Endpoint | HoldfastError] = {}
        for place in sorted(range(len(wishes)), key=lambda place: wishes[place].endpoint_id):
            answers[place] = await self._change(tx, wishes[place])
        return [answers[place] for place in range(len(wishes))]

    async def rotate(self, tx: Tx, endpoint_ids: Sequence[int]) -> list[Endpoint | HoldfastError]:
        """Give endpoints a new secret; the former one signs too for a while. Answers `WebhookNotFound`."""
        answers: dict[int, Endpoint | HoldfastError] = {}
        now_us = self._clock.now_us()
        for endpoint_id in sorted(set(endpoint_ids)):
            found = await store.lock_endpoint(tx, endpoint_id)
            if found is None:
                answers[endpoint_id] = WebhookNotFound()
                continue
            changed = msgspec.structs.replace(
                found,
                secret=Secret(new_secret()),
                previous_secret=found.secret,
                previous_until_us=now_us + self._settings.overlap_ms * US_PER_MS,
                changed_us=now_us,
            )
            await store.update_endpoint(tx, changed)
            answers[endpoint_id] = changed
        return [answers[each] for each in endpoint_ids]

    async def remove(self, tx: Tx, endpoint_ids: Sequence[int]) -> list[HoldfastError | None]:
        """Remove endpoints; what was on its way is cancelled. Answers `WebhookNotFound`."""
        answers: dict[int, HoldfastError | None] = {}
        for endpoint_id in sorted(set(endpoint_ids)):
            await store.cancel_pending(tx, endpoint_id, CANCELLED, self._clock.now_us())
            answers[endpoint_id] = None if await store.delete_endpoint(tx, endpoint_id) else WebhookNotFound()
        return [answers[each] for each in endpoint_ids]

    async def fan_out(self, tx: Tx, events: Sequence[Happened]) -> None:
        """Write a delivery of each event for each endpoint that wants it, and wake up those who send."""
        now_us = self._clock.now_us()
        endpoints = [each for each in await store.all_endpoints(tx) if each.enabled]
        rows = [
            {
                "id": self._ids.next(),
                "endpoint_id": endpoint.id,
                "event_id": event.id,
                "type": event.type,
                "body": _body(event),
                "status": PENDING,
                "attempts": 0,
                "round_start": 0,
                "due_us": now_us,
                "last_status": None,
                "last_error": None,
                "created_us": now_us,
                "changed_us": now_us,
            }
            for event in events
            for endpoint in endpoints
            if endpoint.wants(event.type)
        ]
        await store.insert_deliveries.many(tx, rows)
        await self._wake(tx, sorted({row["endpoint_id"] for row in rows}))  # type: ignore[misc]  # ids are integers

    async def claim(self, tx: Tx, endpoint_ids: Sequence[int]) -> list[Job | HoldfastError | None]:
        """Take one due delivery for each of these requests; None where nothing is due or the endpoint is disabled.

        An attempt is counted before it is made. It is due again when its deadline is long over, in case that nobody
        comes back with its outcome.
        """
        now_us = self._clock.now_us()
        until_us = now_us + (self._settings.timeout_ms + GRACE_MS) * US_PER_MS
        jobs: list[Job | HoldfastError | None] = []
        for endpoint_id in endpoint_ids:
            endpoint = await store.endpoint(tx, endpoint_id)
            found = None
            if endpoint is not None and endpoint.enabled:
                found = await store.claim(tx, endpoint_id, now_us, until_us)
            jobs.append(Job(endpoint=endpoint, delivery=found) if endpoint is not None and found is not None else None)
        return jobs

    async def settle(self, tx: Tx, tried: Sequence[Attempt]) -> list[HoldfastError | None]:
        """Write what became of attempts: done, to be tried again at its time, or failed; judge their endpoints."""
        now_us = self._clock.now_us()
        drafts = []
        for each in sorted(tried, key=lambda attempt: attempt.delivery.id):
            again_us = None if each.answer.accepted else next_try_us(each, self._chance)
            status = DONE if each.answer.accepted else FAILED if again_us is None else PENDING
            mine = each.delivery
            if not await store.settle(tx, mine, status, again_us or mine.due_us, each.answer, now_us):
                continue
            if again_us is not None:
                drafts.append(_due(mine.endpoint_id, again_us))
            if status == FAILED:
                log.warning("webhook_failed", endpoint_id=mine.endpoint_id, delivery_id=mine.id, attempts=mine.attempts)
        rows = [_attempt_row(each) for each in tried]
        await store.insert_attempts.many(tx, rows)
        for endpoint_id in sorted({each.delivery.endpoint_id for each in tried}):
            await self._judge(tx, endpoint_id, [each for each in tried if each.delivery.endpoint_id == endpoint_id])
        await self._outbox.add_all(tx, drafts)
        return [None for _ in tried]

    async def replay(self, tx: Tx, wishes: Sequence[Replay]) -> list[int | HoldfastError]:
        """Send again what is settled, from the beginning of the schedule; answers how many each wish found."""
        answers: list[int | HoldfastError] = []
        for wish in wishes:
            if await store.endpoint(tx, wish.endpoint_id) is None:
                answers.append(WebhookNotFound())
                continue
            found = await store.restart(
                tx,
                wish.endpoint_id,
                self._clock.now_us(),
                delivery_id=wish.delivery_id,
                failed_since_us=wish.failed_since_us,
            )
            if found:
                await self._wake(tx, [wish.endpoint_id])
            answers.append(found)
        return answers

    async def clear(self, tx: Tx, before: Sequence[int]) -> list[int | HoldfastError]:
        """Remove a page of the deliveries settled before each instant; answers how many went."""
        return [await store.remove_settled(tx, before_us, REMOVE_PAGE) for before_us in before]

    def _new(self, wish: NewEndpoint) -> Endpoint:
        now_us = self._clock.now_us()
        return Endpoint(
            id=self._ids.next(),
            url=wish.url,
            description=wish.description,
            types=wish.types,
            enabled=True,
            disabled_reason=None,
            secret=Secret(new_secret()),
            previous_secret=None,
            previous_until_us=None,
            failing_since_us=None,
            flagged_us=None,
            created_us=now_us,
            changed_us=now_us,
        )

    async def _change(self, tx: Tx, wish: Change) -> Endpoint | HoldfastError:
        found = await store.lock_endpoint(tx, wish.endpoint_id)
        if found is None:
            return WebhookNotFound()
        names = wish.changed.__struct_fields__
        given = {name: value for name in names if (value := getattr(wish.changed, name)) is not UNSET}
        if given.get("url") in {each.url for each in await store.all_endpoints(tx) if each.id != found.id}:
            return WebhookExists()
        changed = msgspec.structs.replace(found, **given, changed_us=self._clock.now_us())
        if changed.enabled and not found.enabled:
            changed = msgspec.structs.replace(changed, disabled_reason=None, failing_since_us=None, flagged_us=None)
            await self._wake(tx, [changed.id])
        elif found.enabled and not changed.enabled:
            changed = msgspec.structs.replace(changed, disabled_reason="by hand")
        await store.update_endpoint(tx, changed)
        return changed

    async def _judge(self, tx: Tx, endpoint_id: int, tried: Sequence[Attempt]) -> None:
        """What attempts say of their endpoint: it works, it fails, it has failed for too long, it wants no more."""
        endpoint = await store.lock_endpoint(tx, endpoint_id)
        if endpoint is None:
            return
        changed = endpoint
        now_us = self._clock.now_us()
        if any(each.answer.accepted for each in tried):
            changed = msgspec.structs.replace(changed, failing_since_us=None, flagged_us=None)
        else:
            since_us = endpoint.failing_since_us or min(each.at_us for each in tried)
            changed = msgspec.structs.replace(changed, failing_since_us=since_us)
            if endpoint.flagged_us is None and now_us - since_us >= self._settings.flag_after_ms * US_PER_MS:
                log.error("webhook_flagged", endpoint_id=endpoint_id, failing_since=rfc3339(since_us))
                changed = msgspec.structs.replace(changed, flagged_us=now_us)
        if any(each.answer.status == GONE for each in tried) and endpoint.enabled:
            log.error("webhook_gone", endpoint_id=endpoint_id)
            changed = msgspec.structs.replace(changed, enabled=False, disabled_reason="it answered 410 Gone")
        if changed != endpoint:
            await store.update_endpoint(tx, changed)

    async def _wake(self, tx: Tx, endpoint_ids: Sequence[int]) -> None:
        await self._outbox.add_all(tx, [_due(endpoint_id, None) for endpoint_id in endpoint_ids])


def _body(event: Happened) -> bytes:
    body = {"type": event.type, "timestamp": rfc3339(event.at_us), "data": msgspec.Raw(event.data.encode())}
    return msgspec.json.encode(body)


def _due(endpoint_id: int, due_us: int | None) -> Draft:
    return Draft(
        exchange=topology.WEBHOOKS,
        routing_key=topology.KEY_WEBHOOK_DUE,
        body=WebhookDue(endpoint_id=endpoint_id),
        due_us=due_us,
    )


def _attempt_row(tried: Attempt) -> dict[str, object]:
    return {
        "delivery_id": tried.delivery.id,
        "attempt": tried.delivery.attempts,
        "at_us": tried.at_us,
        "status": tried.answer.status,
        "error": tried.answer.error,
        "answer": tried.answer.text,
        "took_ms": tried.answer.took_ms,
    }
