"""Feed's counter: what readers and the sweeper may ask."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from holdfast.clock import US_PER_S, Clock, rfc3339
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.services.contracts.feed import Happened
from holdfast.services.feed import store
from holdfast.services.feed.actions import REMOVE_PAGE, Feed
from holdfast.services.feed.model import EventPage, EventsExpired, EventView, check_limit, check_types

DAY_US = 86_400 * US_PER_S


class FeedService:
    """One call per question; reads need no writer."""

    def __init__(self, database: Database, group: GroupCommit, feed: Feed, clock: Clock, keep_days: int) -> None:
        self._database = database
        self._group = group
        self._feed = feed
        self._clock = clock
        self._keep_us = keep_days * DAY_US

    async def read(
        self, *, after: int = 0, limit: int = 100, types: Sequence[str] = (), owner: str | None = None
    ) -> EventPage:
        """Events after an id, in order of their ids; with an owner only his. `after` 0 is the oldest kept.

        Who goes on with `next` misses nothing: an event that commits later has a higher id. Raises `InvalidInput`, and
        `EventsExpired` where events after that id were removed for their age.
        """
        check_limit(limit)
        check_types(types)
        async with self._database.read(snapshot=True) as tx:
            last, removed = await store.bounds(tx)
            if 0 < after < removed:
                raise EventsExpired
            found = await store.page(tx, after, limit + 1, types, owner)
        more = len(found) > limit
        found = found[:limit]
        # Nothing up to the counter is missing from this snapshot, whatever of it was asked for.
        upto = found[-1].id if more else max(last, after)
        return EventPage(events=[_view(each) for each in found], next=str(upto), more=more)

    async def sweep(self) -> int:
        """Remove what is older than the feed is kept; answers how many events."""
        before_us = self._clock.now_us() - self._keep_us
        removed = 0
        while True:
            page = await self._group.submit(self._feed.remove, before_us)
            removed += page
            if page < REMOVE_PAGE:
                return removed


def _view(event: Happened) -> EventView:
    data = msgspec.json.decode(event.data)
    return EventView(id=str(event.id), type=event.type, timestamp=rfc3339(event.at_us), data=data)
