"""Webhooks' counter: what staff, the listener and the sweeper may ask."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from holdfast.clock import US_PER_MS, US_PER_S, Clock, rfc3339
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import InvalidInput
from holdfast.services.webhooks import store
from holdfast.services.webhooks.actions import REMOVE_PAGE, Change, Replay, Webhooks
from holdfast.services.webhooks.lanes import Lanes
from holdfast.services.webhooks.model import (
    PENDING,
    STATUSES,
    AttemptView,
    DeliveryLog,
    DeliveryView,
    EndpointChange,
    EndpointView,
    EndpointWithSecret,
    ForbiddenUrl,
    NewEndpoint,
    WebhookNotFound,
    check_event_types,
    target_of,
    view,
    view_with_secret,
)
from holdfast.services.webhooks.needs import Resolver
from holdfast.settings import WebhooksSettings

LIMIT_MAX = 500
DAY_US = 86_400 * US_PER_S


class WebhookBook:
    """What can be read of webhooks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def every(self) -> list[EndpointView]:
        """Every endpoint, oldest first, without its secrets."""
        async with self._database.read() as tx:
            return [view(each) for each in await store.all_endpoints(tx)]

    async def get(self, endpoint_id: int) -> EndpointView:
        """One endpoint; raises `WebhookNotFound`."""
        async with self._database.read() as tx:
            found = await store.endpoint(tx, endpoint_id)
        if found is None:
            raise WebhookNotFound
        return view(found)

    async def deliveries(
        self, endpoint_id: int, *, status: str | None = None, before: int = 0, limit: int = 100
    ) -> list[DeliveryView]:
        """Deliveries to an endpoint, the newest first, with ids below `before`.

        Raises `WebhookNotFound`, or `InvalidInput` for what is no status or limit.
        """
        if status is not None and status not in STATUSES:
            raise InvalidInput(f"status is one of {', '.join(STATUSES)}")
        if not 1 <= limit <= LIMIT_MAX:
            raise InvalidInput(f"limit must be in 1..{LIMIT_MAX}, not {limit}")
        await self.get(endpoint_id)
        async with self._database.read() as tx:
            found = await store.list_deliveries(tx, endpoint_id, status, before, limit)
        return [DeliveryView(**_shown(row)) for row in found]

    async def delivery(self, endpoint_id: int, delivery_id: int) -> DeliveryLog:
        """One delivery with its attempts; raises `WebhookNotFound`."""
        async with self._database.read() as tx:
            row = await store.delivery(tx, endpoint_id, delivery_id)
            tried = await store.log_of(tx, delivery_id)
        if row is None:
            raise WebhookNotFound
        log = [
            AttemptView(
                attempt=each.attempt,
                at=rfc3339(each.at_us),
                status=each.status,
                error=each.error,
                answer=each.answer,
                took_ms=each.took_ms,
            )
            for each in tried
        ]
        return DeliveryLog(**_shown(row), body=msgspec.json.decode(row.body), log=log)


class WebhookDesk(WebhookBook):
    """Changes to webhooks; nothing is sent from here, those who send are woken by a message."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        webhooks: Webhooks,
        resolver: Resolver,
        clock: Clock,
        settings: WebhooksSettings,
    ) -> None:
        super().__init__(database)
        self._group = group
        self._webhooks = webhooks
        self._resolver = resolver
        self._clock = clock
        self._settings = settings

    async def add(self, wish: NewEndpoint) -> EndpointWithSecret:
        """Send events to a URL from now on; the answer alone tells the secret.

        Raises `InvalidInput`, `ForbiddenUrl`, `WebhookExists`, `TooManyWebhooks`.
        """
        check_event_types(wish.types)
        await self._check(wish.url)
        return view_with_secret(await self._group.submit(self._webhooks.add, wish))

    async def change(self, endpoint_id: int, changed: EndpointChange) -> EndpointView:
        """Change an endpoint; raises `InvalidInput`, `ForbiddenUrl`, `WebhookNotFound`, `WebhookExists`."""
        if changed.types is not UNSET:
            check_event_types(changed.types)
        if changed.url is not UNSET:
            await self._check(changed.url)
        wish = Change(endpoint_id=endpoint_id, changed=changed)
        return view(await self._group.submit(self._webhooks.change, wish))

    async def rotate(self, endpoint_id: int) -> EndpointWithSecret:
        """Give an endpoint a new secret; for `overlap_ms` both sign. Raises `WebhookNotFound`."""
        return view_with_secret(await self._group.submit(self._webhooks.rotate, endpoint_id))

    async def remove(self, endpoint_id: int) -> None:
        """Send nothing to an endpoint any more; raises `WebhookNotFound`."""
        await self._group.submit(self._webhooks.remove, endpoint_id)

    async def replay(
        self, endpoint_id: int, *, delivery_id: int | None = None, failed_since_us: int | None = None
    ) -> int:
        """Send one delivery again, or all that failed since an instant; answers how many.

        Raises `InvalidInput` unless exactly one of both is given, and `WebhookNotFound`, also for a delivery that is
        still on its way.
        """
        if (delivery_id is None) == (failed_since_us is None):
            raise InvalidInput("name one delivery, or since when; not both")
        wish = Replay(endpoint_id=endpoint_id, delivery_id=delivery_id, failed_since_us=failed_since_us or 0)
        found = await self._group.submit(self._webhooks.replay, wish)
        if delivery_id is not None and not found:
            raise WebhookNotFound("there is no such delivery, or it is still on its way")
        return found

    async def _check(self, url: str) -> None:
        target = target_of(url, allow_http=self._settings.allow_http)
        try:
            await self._resolver.addresses(target.host, target.port)
        except (OSError, UnicodeError):
            raise ForbiddenUrl(f"{target.host[:100]} cannot be resolved") from None


class WebhookService(WebhookDesk):
    """The desk, and those who send."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        webhooks: Webhooks,
        resolver: Resolver,
        lanes: Lanes,
        clock: Clock,
        settings: WebhooksSettings,
        keep_days: int,
    ) -> None:
        super().__init__(database, group, webhooks, resolver, clock, settings)
        self._lanes = lanes
        self._keep_us = keep_days * DAY_US

    def wake(self, endpoint_id: int) -> None:
        """See to what is due for an endpoint; does not wait for it."""
        self._lanes.wake(endpoint_id)

    async def sweep(self, older_than_ms: int) -> int:
        """Wake up the lanes of endpoints with deliveries that are overdue by so much; answers how many lanes."""
        before_us = self._clock.now_us() - older_than_ms * US_PER_MS
        async with self._database.read() as tx:
            found = await store.overdue(tx, before_us)
        for endpoint_id in found:
            self._lanes.wake(endpoint_id)
        return len(found)

    async def clear(self) -> int:
        """Remove settled deliveries older than events are kept; answers how many. What is pending stays."""
        before_us = self._clock.now_us() - self._keep_us
        removed = 0
        while True:
            page = await self._group.submit(self._webhooks.clear, before_us)
            removed += page
            if page < REMOVE_PAGE:
                return removed

    async def stop(self, within_s: float) -> None:
        """Let the attempts under way end."""
        await self._lanes.stop(within_s)


def _shown(row: Any) -> dict[str, Any]:
    return {
        "id": str(row.id),
        "webhook": str(row.endpoint_id),
        "event": str(row.event_id),
        "type": row.type,
        "status": row.status,
        "attempts": row.attempts,
        "next_at": rfc3339(row.due_us) if row.status == PENDING else None,
        "last_status": row.last_status,
        "last_error": row.last_error,
        "created_at": rfc3339(row.created_us),
    }
