"""Feed's listener: what happened is recorded."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Message
from holdfast.services.contracts import topology
from holdfast.services.contracts.feed import Fact
from holdfast.services.feed.actions import Feed, Told


def listeners(feed: Feed, group: GroupCommit) -> list[Listen]:
    """Facts become events, by the feed's own writer."""

    async def on_facts(tx: Tx, facts: Sequence[Fact], messages: Sequence[Message]) -> None:
        told = [Told(fact=fact, at_us=message.timestamp_us) for fact, message in zip(facts, messages, strict=True)]
        await feed.record(tx, told)

    return [Listen(name="feed.events", queue=topology.FEED_QUEUE, handlers=[on_facts], group=group)]
