"""Verbs of the feed: record events, remove old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.services.contracts.events import Event
from holdfast.services.contracts.feed import Happened, type_id
from holdfast.services.feed import store
from holdfast.services.feed.model import business_key, told
from holdfast.services.feed.needs import Followers, Owners

REMOVE_PAGE = 1_000


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A fact and when its message was written."""

    fact: Event
    at_us: int


class Feed:
    """What the feed can do; it has a writer of its own, since who records holds the counter's row until the commit."""

    def __init__(self, clock: Clock, owners: Owners, followers: Followers) -> None:
        self._clock = clock
        self._owners = owners
        self._followers = followers

    async def record(self, tx: Tx, facts: Sequence[Told]) -> None:
        """Write events, each fact once, and hand them to the followers within `tx`.

        The counter is taken as late as can be. Until the commit nobody else gets an id: whoever sees an event sees
        every one with a lower id.
        """
        fresh: dict[str, Told] = {}
        for each in facts:
            fresh.setdefault(business_key(each.fact), each)
        buyers = await self._buyers(tx, list(fresh.values()))
        first = await store.take_ids(tx, len(fresh))
        known = await store.known(tx, fresh)  # asked under the lock, so that no other process writes one meanwhile
        wanted = [(key, each) for key, each in fresh.items() if key not in known]
        events = [
            Happened(
                id=number,
                type=type_id(each.fact),
                owner=_owner(each.fact, buyers),
                at_us=each.at_us,
                data=msgspec.json.encode(told(each.fact)).decode(),
            )
            for number, (_, each) in enumerate(wanted, start=first)
        ]
        now_us = self._clock.now_us()
        rows = [
            msgspec.structs.asdict(event) | {"key": key, "recorded_us": now_us}
            for event, (key, _) in zip(events, wanted, strict=True)
        ]
        await store.insert_events.many(tx, rows)
        if events:
            await self._followers.fan_out(tx, events)

    async def remove(self, tx: Tx, before: Sequence[int]) -> list[int | HoldfastError]:
        """Remove a page of the events recorded before each instant; answers how many went."""
        return [await store.remove(tx, before_us, REMOVE_PAGE) for before_us in before]

    async def _buyers(self, tx: Tx, facts: Sequence[Told]) -> Mapping[int, str]:
        asked = {each.fact.order_id for each in facts if hasattr(each.fact, "order_id")}
        return await self._owners.buyers(tx, asked) if asked else {}


def _owner(fact: Event, buyers: Mapping[int, str]) -> str | None:
    return buyers.get(getattr(fact, "order_id", 0))
