"""The demo: a crowd buys scarce stock over real HTTP, on a throw-away SQLite file, and an audit says what came of it.

The crowd pays, cancels, vanishes, pays twice, repeats requests; some notices of the provider come twice and some never.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from holdfast import observe
from holdfast.audit import Report, audit
from holdfast.bootstrap import System, migrate_all, running
from holdfast.clock import SystemClock
from holdfast.edge.http.auth import SCOPES, Tokens
from holdfast.edge.report import show
from holdfast.edge.server import listening
from holdfast.services.payments.sandbox import SIGNATURE_HEADER
from holdfast.settings import DatabaseSettings, HttpSettings, OrdersSettings, PaymentsSettings, Secret, Settings

ARRIVAL_S = 12.0  # the crowd comes within this time
PAY_WITHIN_MS = 4_000
SETTLE_S = 20.0  # how long to wait for the last time-out and message
REFRESH_S = 0.25
PRICE_MINOR = 9_900
TRIES = 4  # a buyer whose SKU is sold out looks for another this often

# What buyers do once they have an order, with its weight in percent.
HABITS = {
    "pays": 52,
    "pays, the notice comes twice": 5,
    "pays, the notice is lost": 5,
    "cancels": 15,
    "vanishes": 23,
}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The size of the sale, and the seed of what the crowd does."""

    buyers: int
    skus: int
    units: int
    seed: int


class Tally(msgspec.Struct, kw_only=True):
    """What the crowd saw."""

    arrived: int = 0
    orders: int = 0
    habits: Counter[str] = msgspec.field(default_factory=Counter)
    answers: Counter[int] = msgspec.field(default_factory=Counter)
    sold_out: int = 0
    left_without: int = 0
    surprises: list[str] = msgspec.field(default_factory=list)
    levels: list[dict[str, Any]] = msgspec.field(default_factory=list)


def run(plan: Plan) -> int:
    """Run the sale to its verdict; 0 when the audit is clean, 1 when not, 130 when interrupted."""
    console = Console()
    observe.configure_logs("console", "error")
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as folder:
        return asyncio.run(_demo(plan, Path(folder), console))


async def _demo(plan: Plan, folder: Path, console: Console) -> int:
    interrupted = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, interrupted.set)
    settings = _settings(folder)
    await migrate_all(settings)
    clock = SystemClock()
    started = clock.monotonic()
    async with running(settings) as system, listening(system) as url, _crowd(url, system, plan) as crowd:
        system.work()
        console.print(
            f"{plan.buyers} buyers, {plan.skus} SKUs with {plan.units} units each, {PAY_WITHIN_MS / 1_000:g} s to pay; "
            f"real HTTP at {url}, SQLite at {folder}",
            highlight=False,
            soft_wrap=True,
        )
        done = await _watch(crowd, console, interrupted)
        report = await _settled(system, interrupted) if done else None
        if report is None:
            console.print("interrupted: the server drains and stops; nothing is left behind", highlight=False)
            return 130
    booked = sum(value for name, value in report.figures.items() if name.startswith("orders "))
    if booked != crowd.tally.orders:
        crowd.tally.surprises.append(f"{crowd.tally.orders} orders were acknowledged, {booked} are in the book")
    show(report, console)
    elapsed = clock.monotonic() - started
    console.print(_verdict(crowd.tally, report, elapsed), highlight=False, soft_wrap=True)
    return 0 if report.clean and not crowd.tally.surprises else 1


def _settings(folder: Path) -> Settings:
    return Settings(
        database=DatabaseSettings(url=f"sqlite:///{folder}/holdfast.db"),
        orders=OrdersSettings(time_out_ms=PAY_WITHIN_MS, sweep_ms=1_000),
        payments=PaymentsSettings(sandbox=True, sandbox_secret=Secret(secrets.token_urlsafe(32))),
        http=HttpSettings(port=0, token_secret=Secret(secrets.token_urlsafe(48))),
    )


class Crowd:
    """The buyers, and the HTTP client they share."""

    def __init__(self, client: httpx.AsyncClient, tokens: Tokens, plan: Plan, clock: SystemClock) -> None:
        self.tally = Tally()
        self._client = client
        self._tokens = tokens
        self._plan = plan
        self._clock = clock
        self._skus = [f"SKU-{number:02}" for number in range(1, plan.skus + 1)]

    async def stock_up(self) -> None:
        """Staff puts the units on the shelf."""
        headers = self._bearer("staff", frozenset(SCOPES))
        for sku in self._skus:
            body = {"title": f"Ticket {sku}", "priceMinor": PRICE_MINOR, "currency": "CNY"}
            (await self._client.put(f"/v1/skus/{sku}", json=body, headers=headers)).raise_for_status()
            receipt = {"sku": sku, "quantity": self._plan.units}
            key = headers | {"Idempotency-Key": f"opening-{sku}"}
            (await self._client.post("/v1/stocks/receipts", json=receipt, headers=key)).raise_for_status()

    async def buy(self) -> None:
        """All buyers come, each in its own time, and each does what it does."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.buyers):
                chance = random.Random(f"{self._plan.seed}/{number}")  # noqa: S311  # a crowd, not a secret
                group.create_task(self._buyer(f"buyer-{number}", chance))

    async def look(self) -> None:
        """Read the shelves, as staff would."""
        answer = await self._client.get("/v1/stocks", headers=self._bearer("staff", frozenset(SCOPES)))
        self.tally.levels = answer.json()

    async def _buyer(self, name: str, chance: random.Random) -> None:
        await self._clock.sleep(chance.random() ** 2 * ARRIVAL_S)  # most come early, as to every sale
        self.tally.arrived += 1
        for attempt in range(TRIES):
            # Squared: the first SKUs are what everybody wants.
            sku = self._skus[int(chance.random() ** 2 * len(self._skus))]
            order = await self._place(name, sku, attempt, chance)
            if order is not None:
                await self._then(name, order, chance)
                return
            await self._clock.sleep(chance.random() * 2)
        self.tally.left_without += 1

    async def _place(self, name: str, sku: str, attempt: int, chance: random.Random) -> dict[str, Any] | None:
        headers = self._bearer(name) | {"Idempotency-Key": f"{name}-{attempt}"}
        body = {"lines": [{"sku": sku, "quantity": chance.choice((1, 1, 1, 2))}]}
        clicks = 2 if chance.random() < 0.1 else 1  # a double click is the same wish
        answers = await asyncio.gather(*(self._post("/v1/orders", headers, body) for _ in range(clicks)))
        placed = {answer.content for answer in answers if answer.status_code == 201}
        if not placed:
            self.tally.sold_out += 1
            if any(answer.status_code != 409 for answer in answers):
                self.tally.surprises.append(f"placing answered {answers[0].status_code}: {answers[0].text[:200]}")
            return None
        if len(placed) > 1:
            self.tally.surprises.append("a double click got two different orders")
        self.tally.orders += 1
        order: dict[str, Any] = msgspec.json.decode(placed.pop())
        return order

    async def _then(self, name: str, order: dict[str, Any], chance: random.Random) -> None:
        habit = chance.choices(list(HABITS), weights=list(HABITS.values()))[0]
        self.tally.habits[habit] += 1
        await self._clock.sleep(chance.random() * 2)
        if habit == "cancels":
            await self._post(f"/v1/orders/{order['id']}/cancel", self._bearer(name), None)
        elif habit.startswith("pays"):
            notice = await self._post(order["payment"]["payUrl"], {}, None)
            if notice.status_code == 200 and "lost" not in habit:
                signed = notice.json()
                for _ in range(2 if "twice" in habit else 1):
                    await self._notify(signed)

    async def _notify(self, signed: dict[str, str]) -> None:
        headers = {SIGNATURE_HEADER: signed["signature"], "content-type": "application/json"}
        answer = await self._client.post("/v1/notices/sandbox", content=signed["body"], headers=headers)
        self.tally.answers[answer.status_code] += 1

    async def _post(self, path: str, headers: dict[str, str], body: Any) -> httpx.Response:
        answer = await self._client.post(path, headers=headers, json=body)
        self.tally.answers[answer.status_code] += 1
        return answer

    def _bearer(self, subject: str, scopes: frozenset[str] = frozenset()) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._tokens.issue(subject, scopes, 600)}"}


@asynccontextmanager
async def _crowd(url: str, system: System, plan: Plan) -> AsyncIterator[Crowd]:
    clock = SystemClock()
    tokens = Tokens(system.settings.http.token_secret.reveal(), clock)
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30, trust_env=False) as client:
        crowd = Crowd(client, tokens, plan, clock)
        await crowd.stock_up()
        yield crowd


async def _watch(crowd: Crowd, console: Console, interrupted: asyncio.Event) -> bool:
    """Let the crowd buy and draw the table meanwhile; False when interrupted."""
    clock = SystemClock()
    buying = asyncio.create_task(crowd.buy())
    stop = asyncio.create_task(interrupted.wait())
    try:
        with Live(_table(crowd.tally), console=console, auto_refresh=False) as live:
            while not buying.done() and not stop.done():
                await crowd.look()
                live.update(_table(crowd.tally), refresh=True)
                pause = asyncio.ensure_future(clock.sleep(REFRESH_S))
                await asyncio.wait({buying, stop, pause}, return_when=asyncio.FIRST_COMPLETED)
                pause.cancel()
            if buying.done():
                buying.result()
                await crowd.look()
                live.update(_table(crowd.tally), refresh=True)
            return buying.done()
    finally:
        if not console.is_terminal:
            console.print()  # a table that is not live ends without a line break
        for task in (buying, stop):
            task.cancel()
        await asyncio.wait([buying, stop])


async def _settled(system: System, interrupted: asyncio.Event) -> Report | None:
    """Wait for the last time-outs and messages: the report once nothing waits any more, None when interrupted."""
    clock = SystemClock()
    until = clock.monotonic() + SETTLE_S
    while True:
        report = await audit(system.database, clock, 0)
        waiting = report.figures.get("orders pending_payment", 0) + report.figures["messages waiting"]
        if interrupted.is_set():
            return None
        if (report.clean and not waiting) or clock.monotonic() > until:
            return report
        await clock.sleep(REFRESH_S)


def _table(tally: Tally) -> Table:
    table = Table(title="holdfast demo", show_header=False)
    available, held, sold = (sum(level[name] for level in tally.levels) for name in ("available", "held", "sold"))
    gone = sum(level["available"] == 0 for level in tally.levels)
    rows = {
        "buyers who came": tally.arrived,
        "orders placed": tally.orders,
        "units available / held / sold": f"{available} / {held} / {sold}",
        "SKUs with nothing left": f"{gone} of {len(tally.levels)}",
        "refused: sold out": tally.sold_out,
        "left without an order": tally.left_without,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    for habit in HABITS:
        table.add_row(f"  {habit}", str(tally.habits[habit]))
    return table


def _verdict(tally: Tally, report: Report, elapsed_s: float) -> str:
    lines = [f"surprise: {surprise}" for surprise in tally.surprises[:10]]
    requests = sum(tally.answers.values())
    said = "no unit, order or cent was lost" if report.clean else "something is wrong; see above"
    lines.append(f"{requests} requests, {tally.orders} orders in {elapsed_s:.0f} s: {said}")
    return "\n".join(lines)
