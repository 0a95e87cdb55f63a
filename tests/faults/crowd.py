"""A crowd of buyers over real HTTP, and the history of what was asked and what was acknowledged.

Every request that may be repeated is repeated, with the same key, when its outcome is unknown: the connection dropped,
no answer came in time, or the answer was a 503. Some buyers give up instead, and their outcome stays unknown for ever.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from benchmarks.buyers import notice_body, notice_headers, order_body
from benchmarks.loadgen import HttpClient, LoadError, Response
from tests.faults.processes import HOST, NOTICE_SECRET, bearer, until

BUYERS_AT_ONCE = 16
ASK_S = 8.0  # a little longer than the server's own time-out
PATIENCE_S = 60.0  # how long a buyer repeats one request
PAUSE_S = 0.1  # before repeating
THINK_S = 0.08  # at most, before each step
PROGRESS_S = 45.0  # within this a shop that was hit sells again

NOBODY = "nobody listens"

# What a buyer does once it has an order, with its weight in percent.
HABITS = {
    "pays": 40,
    "pays, the notice comes twice": 8,
    "pays, the notice is lost": 7,
    "cancels": 15,
    "cancels, is charged all the same": 6,
    "is charged after the deadline": 4,
    "vanishes": 20,
}
LOOKS = 0.1  # buyers who read their order right after placing it
DOUBLE_CLICKS = 0.1  # buyers who send the same wish twice at once
GIVES_UP = 0.1  # buyers who do not repeat a wish whose outcome is unknown
SHELVES = {"SKU-plenty": 1_000_000, "SKU-some": 60, "SKU-few": 12, "SKU-last": 3}


class Payment(msgspec.Struct, rename="camel"):
    """How an order is paid."""

    id: str
    pay_url: str | None = None


class Order(msgspec.Struct, rename="camel"):
    """The part of an order that its buyer needs."""

    id: str
    status: str
    amount_minor: int
    currency: str
    pay_by: str
    payment: Payment


class _Problem(msgspec.Struct):
    code: str = ""


class _Signed(msgspec.Struct):
    body: str
    signature: str


@dataclass(frozen=True)
class Wish:
    """One order that a buyer asks for; repeating it is the same wish."""

    buyer: str
    key: str
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return bearer(self.buyer) | {"idempotency-key": self.key, "content-type": "application/json"}


@dataclass
class History:
    """What was asked, and every fact that was acknowledged."""

    asked: dict[str, Wish] = field(default_factory=dict)  # by key
    placed: dict[str, bytes] = field(default_factory=dict)  # key -> body of the 201
    refused: dict[str, str] = field(default_factory=dict)  # key -> why
    cancelled: set[str] = field(default_factory=set)  # orders whose cancelling was answered with 200
    captured: set[str] = field(default_factory=set)  # orders whose buyer paid at the provider, in time
    noticed: set[str] = field(default_factory=set)  # ... and whose notice was answered with `success`
    charged_late: set[str] = field(default_factory=set)  # orders that ended before their notice got its `success`
    cut: Counter[str] = field(default_factory=Counter)  # requests without an answer, by kind
    replayed: int = 0  # orders that were placed although their first request got no answer
    surprises: list[str] = field(default_factory=list)

    @property
    def cut_in_flight(self) -> int:
        """Requests that were sent and have no answer; not those that found nobody listening."""
        return sum(count for kind, count in self.cut.items() if kind != NOBODY)


class Client:
    """Asks one server, and notes what it did not answer."""

    def __init__(self, http: HttpClient, history: History) -> None:
        self._http = http
        self._history = history

    async def ask(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Response | None:
        """The answer, or None when nobody knows what became of the request."""
        try:
            response = await self._http.request(method, path, headers, body)
        except LoadError as error:
            nobody = str(error).startswith("cannot connect")
            self._history.cut[NOBODY if nobody else type(error).__name__] += 1
            return None
        if response.status == 503:
            self._history.cut[f"503 {code_of(response)}"] += 1
            return None
        return response

    async def insist(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Response | None:
        """Ask until there is an answer; None when the patience ends before."""
        patience_ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < patience_ends:
            if (response := await self.ask(method, path, headers, body)) is not None:
                return response
            await asyncio.sleep(PAUSE_S)
        self._history.surprises.append(f"{method} {path} got no answer in {PATIENCE_S} s")
        return None


@asynccontextmanager
async def connected(port: int, history: History, connections: int = 2 * BUYERS_AT_ONCE) -> AsyncIterator[Client]:
    """A client of the server at a port of this machine."""
    async with HttpClient(HOST, port, connections, deadline_seconds=ASK_S) as http:
        yield Client(http, history)


async def stock_up(client: Client, shelves: dict[str, int]) -> None:
    """Staff puts units of SKUs on the shelf; all new."""
    headers = bearer("staff", staff=True) | {"content-type": "application/json"}
    for sku, quantity in shelves.items():
        body = msgspec.json.encode({"title": sku, "priceMinor": 1_000, "currency": "CNY"})
        await _must(client, "PUT", f"/v1/skus/{sku}", headers, body)
        receipt = msgspec.json.encode({"sku": sku, "quantity": quantity})
        await _must(client, "POST", "/v1/stocks/receipts", headers | {"idempotency-key": f"opening-{sku}"}, receipt)


async def place(client: Client, wish: Wish) -> Response | None:
    """Ask for an order once."""
    return await client.ask("POST", "/v1/orders", wish.headers, wish.body)


class Crowd:
    """Buyers who come one after the other in a few lanes, until told to stop."""

    def __init__(self, client: Client, history: History, seed: int) -> None:
        self._client = client
        self._history = history
        self._seed = seed
        self._came = 0
        self._closing = False

    @asynccontextmanager
    async def buying(self) -> AsyncIterator[None]:
        """Buyers come as long as the block runs; afterwards those who came finish what they do."""
        lanes = [asyncio.create_task(self._lane()) for _ in range(BUYERS_AT_ONCE)]
        try:
            yield
            self._closing = True
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.wait(lanes)

    async def progress(self, orders: int) -> None:
        """Wait until so many further orders were acknowledged; fails with the surprises if that takes too long."""
        goal = len(self._history.placed) + orders
        what = f"{orders} further orders; without an answer: {self._history.cut}; {self._history.surprises[:5]}"
        await until(lambda: len(self._history.placed) >= goal, what, PROGRESS_S)

    async def _lane(self) -> None:
        while not self._closing:
            self._came += 1
            await self._buyer(self._came, random.Random(f"{self._seed}/{self._came}"))

    async def _buyer(self, number: int, chance: random.Random) -> None:
        sku = chance.choice(list(SHELVES))
        wish = Wish(f"buyer-{number}", f"key-{number}", order_body(sku, chance.choice((1, 1, 1, 2))))
        order = await self._place(wish, chance)
        if order is None:
            return
        if chance.random() < LOOKS:
            await self._look(wish, order)
        await self._think(chance)
        match chance.choices(list(HABITS), weights=list(HABITS.values()))[0]:
            case "pays":
                await self._pay(order, notices=1)
            case "pays, the notice comes twice":
                await self._pay(order, notices=2)
            case "pays, the notice is lost":
                await self._pay(order, notices=0)
            case "cancels":
                await self._cancel(wish, order)
            case "cancels, is charged all the same":
                if await self._cancel(wish, order):
                    await self._charge(order)
            case "is charged after the deadline":
                await asyncio.sleep(max(0.0, datetime.fromisoformat(order.pay_by).timestamp() - time.time()) + 0.1)
                await self._charge(order)

    async def _place(self, wish: Wish, chance: random.Random) -> Order | None:
        self._history.asked[wish.key] = wish
        call = self._client.ask if chance.random() < GIVES_UP else self._client.insist
        clicks = 2 if chance.random() < DOUBLE_CLICKS else 1
        answers = await asyncio.gather(*(call("POST", "/v1/orders", wish.headers, wish.body) for _ in range(clicks)))
        bodies = {answer.body for answer in answers if answer is not None and answer.status == 201}
        if clicks == 1 and answers[0] is not None:
            self._history.replayed += "idempotent-replayed" in answers[0].headers
        if len(bodies) > 1:
            self._surprise(f"{wish.key} got two different orders", bodies)
        if bodies:
            body = bodies.pop()
            self._history.placed[wish.key] = body
            return msgspec.json.decode(body, type=Order)
        for answer in answers:
            if answer is not None and (answer.status != 409 or code_of(answer) != "sold_out"):
                self._surprise(f"placing {wish.key}", answer)
        if None not in answers:
            self._history.refused[wish.key] = "sold_out"
        return None

    async def _look(self, wish: Wish, order: Order) -> None:
        answer = await self._client.insist("GET", f"/v1/orders/{order.id}", bearer(wish.buyer))
        if answer is not None and answer.status != 200:
            self._surprise(f"order {order.id} was acknowledged and cannot be read", answer)

    async def _cancel(self, wish: Wish, order: Order) -> bool:
        answer = await self._client.insist("POST", f"/v1/orders/{order.id}/cancel", bearer(wish.buyer))
        if answer is not None and answer.status == 200:
            self._history.cancelled.add(order.id)
            return True
        if answer is not None and (answer.status != 409 or code_of(answer) != "order_not_cancellable"):
            self._surprise(f"cancelling {order.id}", answer)
        return False

    async def _pay(self, order: Order, notices: int) -> None:
        assert order.payment.pay_url is not None
        answer = await self._client.insist("POST", order.payment.pay_url, {})
        if answer is None:
            return
        if answer.status != 200:
            if answer.status != 409 or code_of(answer) != "trade_closed":
                self._surprise(f"paying {order.id}", answer)
            return
        self._history.captured.add(order.id)
        signed = msgspec.json.decode(answer.body, type=_Signed)
        headers = {"sandbox-signature": signed.signature, "content-type": "application/json"}
        for _ in range(notices):
            if await self._notify(order, headers, signed.body.encode()):
                self._history.noticed.add(order.id)

    async def _charge(self, order: Order) -> None:
        """The provider takes money for an order that has ended."""
        body = notice_body(order.payment.id, order.amount_minor, order.currency)
        if await self._notify(order, notice_headers(NOTICE_SECRET.encode(), body), body):
            self._history.charged_late.add(order.id)

    async def _notify(self, order: Order, headers: dict[str, str], body: bytes) -> bool:
        answer = await self._client.insist("POST", "/v1/notices/sandbox", headers, body)
        if answer is None:
            return False
        if answer.status != 200 or answer.body != b"success":
            self._surprise(f"the notice of {order.id}", answer)
            return False
        return True

    async def _think(self, chance: random.Random) -> None:
        await asyncio.sleep(chance.random() * THINK_S)

    def _surprise(self, what: str, answer: Response | set[bytes]) -> None:
        told = f"{answer.status} {answer.body[:300]!r}" if isinstance(answer, Response) else repr(answer)
        self._history.surprises.append(f"{what}: {told}")


def code_of(response: Response) -> str:
    """The code of a refusal; empty for what is none."""
    try:
        return msgspec.json.decode(response.body, type=_Problem).code
    except msgspec.DecodeError:
        return ""


async def _must(client: Client, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
    answer = await client.insist(method, path, headers, body)
    assert answer is not None, f"{method} {path} got no answer"
    assert answer.status in (200, 201), f"{method} {path}: {answer.status} {answer.body!r}"
