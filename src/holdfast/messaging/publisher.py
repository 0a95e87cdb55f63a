"""Publisher: encode, send, wait for the confirm, and never call a lost message delivered."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast import observe
from holdfast.clock import Clock
from holdfast.deadline import Deadlines
from holdfast.errors import PublishError, PublishRejected, PublishUnconfirmed
from holdfast.ids import IdSource
from holdfast.messaging import tracing
from holdfast.messaging.codec import Codec
from holdfast.messaging.draft import Composer, Draft
from holdfast.messaging.message import Outgoing
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.transport import Transport

DEADLINE_S = 10.0
ON_ITS_WAY = PublishUnconfirmed("on its way")  # stands for an outcome while nobody knows it

log = observe.logger("publisher")


class Publisher:
    """Sends typed messages outside of any transaction; within one, use the outbox."""

    def __init__(
        self, transport: Transport, codec: Codec, clock: Clock, ids: IdSource, retry: RetryPolicy | None = None
    ) -> None:
        self._transport = transport
        self._composer = Composer(codec, clock, ids)
        self._clock = clock
        self._ids = ids
        self._retry = retry or RetryPolicy(tries=3, interval_ms=1_000)
        self._deadlines = Deadlines()
        self._chance = random.Random()  # noqa: S311  # jitter

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: Any,
        *,
        delay_ms: int = 0,
        expires_ms: int | None = None,
        headers: Mapping[str, str] | None = None,
        mandatory: bool = True,
        message_id: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> str:
        """Send one message and return its id once it is stored.

        A message known not to be stored is tried again (3 tries, 1 s apart, by default), all within `deadline_s`; each
        failed try is logged.
        Raises `Unroutable`, `PublishRejected` (not stored) or `PublishUnconfirmed` (unknown: publish again with the
        same `message_id`, and the inbox drops the copy).
        """
        draft = Draft(
            exchange=exchange,
            routing_key=routing_key,
            body=body,
            delay_ms=delay_ms,
            expires_ms=expires_ms,
            headers=headers or {},
            mandatory=mandatory,
            message_id=message_id or self._ids.message_id(),
        )
        (problem,) = await self.publish_all([draft], deadline_s=deadline_s)
        if problem is not None:
            raise problem
        return str(draft.message_id)

    async def publish_all(
        self, drafts: Sequence[Draft], *, deadline_s: float = DEADLINE_S
    ) -> list[PublishError | None]:
        """Send a batch and answer for each message None once it is stored, or what became of it.

        Those known not to be stored are tried again, the others are not. Raises `InvalidInput` for a draft that cannot
        be sent; then none was.
        """
        outcomes: list[PublishError | None] = []
        with tracing.sending(drafts, self._composer.outgoing) as sending:
            try:
                async with self._deadlines.within(deadline_s):
                    outcomes += await self._transport.publish(sending.batch)
                    if any(outcomes):
                        await self._send_again(sending.batch, outcomes)
            except TimeoutError:
                unknown = f"no confirm within {deadline_s} s; it may or may not be stored"
                known = outcomes or [ON_ITS_WAY] * len(drafts)
                outcomes = [PublishUnconfirmed(unknown) if each is ON_ITS_WAY else each for each in known]
            sending.ended(outcomes)
        return outcomes

    async def _send_again(self, batch: Sequence[Outgoing], outcomes: list[PublishError | None]) -> None:
        """Send what is known not to be stored until every outcome is final."""
        attempt = 1
        while True:
            again = {at: wait for at, each in enumerate(outcomes) if (wait := self._wait_ms(attempt, each)) is not None}
            self._note(attempt, outcomes)
            if not again:
                return
            attempt += 1
            await self._clock.sleep(max(again.values()) / 1_000)
            for at in again:
                outcomes[at] = ON_ITS_WAY
            problems = await self._transport.publish([batch[at] for at in again])
            for at, problem in zip(again, problems, strict=True):
                outcomes[at] = problem

    def _note(self, attempt: int, problems: Sequence[PublishError | None]) -> None:
        """Log a try that trying again can mend: one line for a batch, with the first of its problems."""
        failed = [problem for problem in problems if problem is not None and problem.retryable]
        if failed:
            first = failed[0]
            log.warning("publish_failed", attempt=attempt, messages=len(failed), error=first.code, detail=first.detail)

    def _wait_ms(self, attempt: int, problem: PublishError | None) -> int | None:
        if not isinstance(problem, PublishRejected) or not problem.retryable:
            return None
        return self._retry.delay_ms(attempt, problem, self._chance)
