"""Group commit: concurrent callers hand in requests, one transaction decides many of them, each gets its own answer.

The batch forms by itself: while one transaction commits, the next requests gather. A lone request therefore never
waits for company. One transaction per buyer is the ceiling of every order system on one hot row; this lifts it.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.border import KeyTaken
from holdfast.db.database import Database, Tx
from holdfast.errors import Conflict, HoldfastError, InvalidInput, OutcomeUnknown, Overloaded, ShuttingDown, Unavailable

Q = TypeVar("Q")
A = TypeVar("A")
Decide = Callable[[Tx, Sequence[Q]], Awaitable[Sequence[A | HoldfastError]]]
"""Decides requests in order of arrival within `tx` and returns, at the same place, an answer or a refusal.

A refusal (an error that is returned) must have changed nothing. A raised error voids the whole transaction: the batch
is then split until the guilty request stands alone, so its neighbours get what they would have got without it.
"""

TRIES_MAX = 5
BACKOFF_S = 0.02

log = observe.logger("group_commit")


class _Job:
    __slots__ = ("answer", "arrived", "decide", "request", "trace")

    def __init__(
        self,
        decide: Decide[Any, Any],
        request: Any,
        arrived: float,
        answer: asyncio.Future[Any],
        trace: Mapping[str, str],
    ) -> None:
        self.trace = trace
        self.decide = decide
        self.request = request
        self.arrived = arrived
        self.answer = answer


class GroupCommit:
    """One writer that decides batches of requests, each batch in one transaction.

    Guarantees: an answer is given only after the commit; `Unavailable` means nothing happened; `OutcomeUnknown` means
    the reply to COMMIT was lost; requests of one `decide` are decided in order of arrival; when `queue_max` requests
    wait, a further one is refused at once with `Overloaded`.
    """

    def __init__(
        self, database: Database, clock: Clock, *, name: str = "main", batch_max: int = 200, queue_max: int = 10_000
    ) -> None:
        self._database = database
        self._clock = clock
        self._name = name
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._waiting: deque[_Job] = deque()
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False
        self._deciding = False

    def start(self) -> None:
        """Begin to decide; must be called with the loop running."""
        self._worker = asyncio.create_task(self._run(), name=f"group-commit-{self._name}")
        self._worker.add_done_callback(self._ended)

    async def close(self) -> None:
        """Refuse new requests, decide those that wait, stop."""
        self._closing = True
        self._arrival.set()
        if self._worker is not None:
            await asyncio.wait([self._worker])

    async def submit(self, decide: Decide[Q, A], request: Q, *, traced: bool = True) -> A:
        """Hand in one request and wait for its answer; `traced` notes in the transaction which trace it belongs to.

        Raises the refusal that `decide` returned, `InvalidInput` within a decision of this very writer, `Overloaded`,
        `ShuttingDown`, `Unavailable`, `Conflict` or `OutcomeUnknown`. A caller that is cancelled before its batch began
        leaves no trace; afterwards the request is decided all the same.
        """
        self._refuse_own()
        return await self._hand_in(decide, request, observe.trace_headers() if traced else {})

    async def submit_all(self, decide: Decide[Q, A], requests: Sequence[Q]) -> list[A | Exception]:
        """Hand in several requests that are independent of each other; answers each, a failure in its place.

        Each is decided as if it had been submitted alone, at a fraction of what a task for each would cost. Raises
        only `InvalidInput`, as `submit` does.
        """
        self._refuse_own()
        trace = observe.trace_headers()
        handed_in: list[asyncio.Future[A] | HoldfastError] = []
        for request in requests:
            try:
                handed_in.append(self._hand_in(decide, request, trace))
            except HoldfastError as error:
                handed_in.append(error)
        answers: list[A | Exception] = []
        try:
            for each in handed_in:
                answer = each if isinstance(each, HoldfastError) else await _outcome(each)
                answers.append(answer)  # one by one: a cancelled caller has to know how far it came
        except asyncio.CancelledError:
            for each in handed_in[len(answers) :]:
                if isinstance(each, asyncio.Future):
                    each.cancel()
            raise
        return answers

    def _hand_in(self, decide: Decide[Q, A], request: Q, trace: Mapping[str, str]) -> asyncio.Future[A]:
        if self._closing:
            raise ShuttingDown("this process is stopping; try again elsewhere")
        if len(self._waiting) >= self._queue_max:
            observe.queue_refusals.labels(self._name).inc()
            raise Overloaded(f"{self._queue_max} requests wait already; try again in a moment")
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(decide, request, self._clock.monotonic(), answer, trace))
        self._arrival.set()
        return answer

    def _refuse_own(self) -> None:
        if self._deciding and asyncio.current_task() is self._worker:
            raise InvalidInput(
                "this is called from within a transaction of the same writer, which would wait for itself; "
                "use the transaction at hand: outbox.add(tx, ...) instead of publisher.publish(...)"
            )

    def _ended(self, worker: asyncio.Task[None]) -> None:
        """Nobody may wait for a worker that is gone."""
        self._closing = True
        if not worker.cancelled() and (failure := worker.exception()) is not None:
            log.error("group_commit_died", name=self._name, exc_info=failure)
        _fail(list(self._waiting), ShuttingDown("this process is stopping; nothing was changed, try again elsewhere"))
        self._waiting.clear()

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                if self._closing:
                    return
                self._arrival.clear()
                await self._arrival.wait()
                continue
            batch = [self._waiting.popleft() for _ in range(min(self._batch_max, len(self._waiting)))]
            batch = [job for job in batch if not job.answer.cancelled()]
            if batch:
                self._measure(batch)
                self._deciding = True
                await self._settle(batch)
                self._deciding = False

    def _measure(self, batch: list[_Job]) -> None:
        observe.batch_size.labels(self._name).observe(len(batch))
        observe.batch_wait.labels(self._name).observe(self._clock.monotonic() - batch[0].arrived)

    async def _settle(self, batch: list[_Job]) -> None:
        """Give every job of the batch its answer, whatever happens."""
        try:
            answers = await self._decide_with_retry(batch)
        except (OutcomeUnknown, Unavailable) as error:
            _fail(batch, error)
            return
        except BaseException as error:
            if not isinstance(error, Exception) and _stopping():
                _fail(batch, OutcomeUnknown("the process stopped while this was decided"))
                raise
            if len(batch) == 1:
                _fail(batch, error.failure if isinstance(error, _OwnFailure) else error)
                return
        else:
            for job, answer in zip(batch, answers, strict=True):
                _give(job, answer)
            return
        # Out here, so that what fails next does not carry this failure, perhaps a neighbour's, as its context.
        observe.batch_splits.labels(self._name).inc()
        middle = len(batch) // 2
        await self._settle(batch[:middle])
        await self._settle(batch[middle:])

    async def _decide_with_retry(self, batch: list[_Job]) -> list[Any]:
        """Nothing was committed after `Conflict` or `Unavailable`, so the same batch may simply be decided again."""
        for attempt in range(1, TRIES_MAX + 1):
            try:
                return await self._decide(batch)
            except (Conflict, Unavailable) as error:
                # A taken key may be one request's own, for good; the halves of a batch are decided again anyway.
                if attempt == TRIES_MAX or (isinstance(error, KeyTaken) and len(batch) > 1):
                    raise
                log.warning(
                    "batch_again",
                    name=self._name,
                    attempt=attempt,
                    error=error.code,
                    detail=error.detail,
                    cause=repr(error.__cause__)[:300],
                )
                await self._clock.sleep(BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311  # jitter
        raise AssertionError("unreachable")

    async def _decide(self, batch: list[_Job]) -> list[Any]:
        verbs: dict[Decide[Any, Any], list[int]] = {}
        for index, job in enumerate(batch):
            verbs.setdefault(job.decide, []).append(index)
        answers: list[Any] = [None] * len(batch)
        async with self._database.transaction() as tx:
            for job in batch:
                if job.trace:
                    tx.caused(job.request, job.trace)
            for decide, indexes in verbs.items():
                given = await _own_failures(decide, tx, [batch[index].request for index in indexes])
                for index, answer in zip(indexes, given, strict=True):
                    answers[index] = answer
        return answers


class _OwnFailure(Exception):
    """A decision found a neighbour of its own away; the database is well, and the rest of the batch with it."""

    def __init__(self, failure: HoldfastError) -> None:
        super().__init__(failure)
        self.failure = failure


async def _own_failures(decide: Decide[Any, Any], tx: Tx, requests: Sequence[Any]) -> Sequence[Any]:
    try:
        return await decide(tx, requests)
    except (Unavailable, OutcomeUnknown) as error:
        if tx.void is None:
            raise _OwnFailure(error) from error
        raise


async def _outcome(answer: Awaitable[A]) -> A | Exception:
    try:
        return await answer
    except Exception as error:
        return error


def _give(job: _Job, answer: Any) -> None:
    if job.answer.done():  # its caller was cancelled meanwhile
        return
    if isinstance(answer, HoldfastError):
        job.answer.set_exception(answer)
    else:
        job.answer.set_result(answer)


def _stopping() -> bool:
    """Whether the worker itself is cancelled, and not something that a decision waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _fail(batch: list[_Job], error: BaseException) -> None:
    for job in batch:
        if not job.answer.done():
            job.answer.set_exception(_twin(error))


def _twin(error: BaseException) -> Exception:
    """An equal error for each caller: one raised instance would gather the tracebacks of all of them."""
    if not isinstance(error, Exception):
        return RuntimeError(f"the decision was ended by {type(error).__name__}")
    try:
        twin = copy.copy(error)
    except Exception:  # a class that cannot be copied is shared, tracebacks and all
        return error
    twin.__cause__ = error
    return twin
