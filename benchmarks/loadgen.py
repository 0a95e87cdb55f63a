"""A closed-loop HTTP/1.1 load generator that costs the machine as little as Python can.

Server, database and load share two cores in these benchmarks, so every cycle spent here is one
the measured system does not get.  Hence a raw ``asyncio.Protocol`` with the httptools parser in
place of a general HTTP client.  The report carries the generator's own CPU time, so that a reader
can see when the generator rather than the server set the pace.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import httptools

KEPT_FAILURES = 5
PROBE_STEPS = 300_000


class LoadError(Exception):
    """A request got no usable response."""


class ConnectionDropped(LoadError):
    """The server could not be reached, or went away before its response was complete."""


class DeadlineExceeded(LoadError):
    """The response was not complete within the request's deadline."""


class BrokenResponse(LoadError):
    """The server sent bytes that are not HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Response:
    """One complete HTTP response; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight (no pipelining)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._label = ""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    @property
    def usable(self) -> bool:
        """Whether another request may be sent; a server may close an idle connection at any time."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, label: str, message: bytes) -> asyncio.Future[Response]:
        """Write one request and return the future of its response."""
        assert self._transport is not None
        assert self._waiter is None
        self._label, self._body = label, []
        self._waiter = self._loop.create_future()
        self._transport.write(message)
        return self._waiter

    def close(self) -> None:
        """Close the connection and forget a response that is still awaited."""
        self._waiter = None
        if self._transport is not None:
            self._transport.close()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BrokenResponse(f"{self._label}: {error!r}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        received = sum(map(len, self._body))
        why = repr(exc) if exc else "closed by the server"
        self._fail(ConnectionDropped(f"{self._label}: {why} after {received} body bytes of an incomplete response"))

    def _fail(self, error: LoadError) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    # --- httptools callbacks

    def on_message_begin(self) -> None:
        self._headers = {}
        self._body = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, chunk: bytes) -> None:
        self._body.append(chunk)

    def on_message_complete(self) -> None:
        response = Response(self._parser.get_status_code(), self._headers, b"".join(self._body))
        if response.status < 200:  # 100 Continue and its like precede the real response
            return
        waiter, self._waiter = self._waiter, None
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        if waiter is not None and not waiter.done():
            waiter.set_result(response)


class HttpClient:
    """A fixed number of keep-alive connections to one server.

    Use it as an async context manager: entering opens every connection, so that no measured request
    pays for a connect.  A request takes a free connection, or waits for one.  Nothing is ever sent
    twice: a retry would hide a fault and spoil the latencies.
    """

    def __init__(self, host: str, port: int, connections: int, *, deadline_seconds: float = 30.0) -> None:
        self._host = host
        self._port = port
        self._size = connections
        self._deadline = deadline_seconds
        self._slots = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []
        self._host_header = f"host: {host}:{port}\r\n"

    async def __aenter__(self) -> Self:
        self._idle.extend(await asyncio.gather(*(self._connect() for _ in range(self._size))))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes, *, deadline_seconds: float | None = None
    ) -> Response:
        """Send one request and return its response, or raise a ``LoadError`` that names the request.

        The deadline covers all of it: the wait for a free connection, the connect, the exchange.
        """
        label = f"{method} {path}"
        message = self._message(label, headers, body)
        seconds = self._deadline if deadline_seconds is None else deadline_seconds
        try:
            async with asyncio.timeout(seconds), self._slots:
                return await self._exchange(label, message)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{label}: no complete response within {seconds} s") from error

    async def _exchange(self, label: str, message: bytes) -> Response:
        connection = self._idle.pop() if self._idle else None
        if connection is None or not connection.usable:
            connection = await self._connect()
        try:
            response = await connection.send(label, message)
        except BaseException:
            # A late response on this connection would answer the next request.
            connection.close()
            raise
        self._idle.append(connection)
        return response

    async def _connect(self) -> _Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionDropped(f"cannot connect to {self._host}:{self._port}: {error}") from error
        return connection

    def _message(self, label: str, headers: dict[str, str], body: bytes) -> bytes:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        head = f"{label} HTTP/1.1\r\n{self._host_header}{lines}content-length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body


@dataclass(frozen=True, slots=True)
class BuyerOutcome:
    """How one virtual buyer ended, and the seconds each of its steps took."""

    outcome: str
    seconds: dict[str, float] = field(default_factory=dict)


MakeBuyer = Callable[[int], Awaitable[BuyerOutcome]]


@dataclass(frozen=True, slots=True)
class StepLatency:
    """Latency of one step over all buyers that completed it."""

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load run saw, as plain data that survives JSON."""

    buyers: int
    concurrency: int
    elapsed_seconds: float
    ended_monotonic: float
    """When the load ended on ``time.monotonic``, which all processes of a Linux machine share."""
    generator_cpu_seconds: float
    outcomes: dict[str, int]
    steps: dict[str, StepLatency]
    failures: list[str]

    def per_second(self, outcome: str) -> float:
        """Buyers per second that ended with this outcome, over the whole run."""
        return self.outcomes.get(outcome, 0) / self.elapsed_seconds


async def run_load(make_buyer: MakeBuyer, buyers_total: int, concurrency: int) -> LoadReport:
    """Run buyers ``0 .. buyers_total - 1``, ``concurrency`` at a time, and report on them.

    The load is closed: the next buyer starts when one ends, so a slow server is asked less often and
    the latencies hold at this concurrency only.  A buyer that raises ``LoadError`` counts as an
    outcome ``failed_<kind>``; any other exception is a bug in the benchmark and ends the run.
    """
    results: list[BuyerOutcome] = []
    failures: list[str] = []
    indexes = iter(range(buyers_total))

    async def lane() -> None:
        for index in indexes:
            try:
                results.append(await make_buyer(index))
            except LoadError as error:
                results.append(BuyerOutcome(f"failed_{type(error).__name__}"))
                if len(failures) < KEPT_FAILURES:
                    failures.append(str(error))

    started, cpu_started = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as lanes:
        for _ in range(min(concurrency, buyers_total)):
            lanes.create_task(lane())
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    ended = time.monotonic()
    return LoadReport(
        buyers=buyers_total,
        concurrency=concurrency,
        elapsed_seconds=elapsed,
        ended_monotonic=ended,
        generator_cpu_seconds=cpu,
        outcomes=dict(Counter(result.outcome for result in results)),
        steps=_latencies(results),
        failures=failures,
    )


def probe_machine() -> float:
    """Return the seconds this machine takes, right now, for a fixed piece of Python work.

    Virtual machines change speed under a benchmark, by a factor of two and without a trace in steal
    time.  Rates are comparable only between runs whose probes agree.  Probe while the server is idle.
    """
    kept: dict[int, tuple[int, str]] = {}
    started = time.perf_counter()
    for step in range(PROBE_STEPS):
        kept[step & 1023] = (step, str(step))
    return time.perf_counter() - started


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of values that are already in ascending order."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def _latencies(results: Sequence[BuyerOutcome]) -> dict[str, StepLatency]:
    by_step: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        for step, seconds in result.seconds.items():
            by_step[step].append(seconds * 1000)
    report = {}
    for step, values in by_step.items():
        values.sort()
        p50, p95, p99 = (percentile(values, percent) for percent in (50, 95, 99))
        report[step] = StepLatency(len(values), p50, p95, p99)
    return report
