"""The counter: a served shop, the means to talk to it, and a look at everything its database holds."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jwt
import msgspec
from sqlalchemy import text

from holdfast import observe
from holdfast.bootstrap import System, migrate_all, running
from holdfast.clock import US_PER_S
from holdfast.edge.http.stock import STOCK
from holdfast.edge.server import listening
from holdfast.messaging.tables import metadata as messaging_tables
from holdfast.services.orders.model import OrderView
from holdfast.services.payments.sandbox import SIGNATURE_HEADER
from holdfast.services.schema import metadata as services_tables
from holdfast.services.stock.model import Sku
from holdfast.settings import Settings
from tests.conftest import quick_settings
from tests.shop import PRICE_MINOR, stock_up

TOKEN_SECRET = quick_settings("sqlite://").http.token_secret.reveal()
SANDBOX_SECRET = quick_settings("sqlite://").payments.sandbox_secret.reveal()
PROBLEM = "application/problem+json"
TABLES = [*messaging_tables.sorted_tables, *services_tables.sorted_tables]
WAIT_S = 10.0

State = list[tuple[str, str]]
"""Every row of every table, as (table, its columns in text)."""


def settings_on(url: str) -> Settings:
    """Quick settings of a shop on a free port."""
    settings = quick_settings(url)
    return msgspec.structs.replace(settings, http=msgspec.structs.replace(settings.http, port=0))


class Counter:
    """A served shop and a client in front of it."""

    def __init__(self, system: System, url: str, client: httpx.AsyncClient) -> None:
        self.system = system
        self.url = url
        self.client = client
        self._looking = _look_at_all(system.database.dialect)

    @property
    def now_s(self) -> int:
        return self.system.clock.now_us() // US_PER_S

    def claims(self, subject: str, scope: str = "") -> dict[str, Any]:
        """What a good token of a subject says."""
        return {"sub": subject, "exp": self.now_s + 3_600, "scope": scope}

    def bearer(self, subject: str, scope: str = "") -> dict[str, str]:
        """The header of a subject with a good token, made without the code under test."""
        return {"authorization": "Bearer " + jwt.encode(self.claims(subject, scope), TOKEN_SECRET, algorithm="HS256")}

    def staff(self) -> dict[str, str]:
        """The header of an employee."""
        return self.bearer("boss", STOCK)

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str | bytes] | None = None,
        *,
        body: Any = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """Send one request; `body` is sent as JSON, `content` as it is."""
        raw = [
            (name.encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in (headers or {}).items()
        ]
        if body is not None:
            content = json.dumps(body).encode()
        if content is not None and not any(name.lower() == b"content-type" for name, _ in raw):
            raw.append((b"content-type", b"application/json"))
        return await self.client.request(method, path, headers=raw, content=content)

    async def place(
        self,
        buyer: str = "ann",
        *,
        key: str = "key-1",
        sku: str = "SKU-1",
        quantity: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Order some units of one SKU."""
        sent = self.bearer(buyer) | {"idempotency-key": key} | dict(headers or {})
        return await self.ask("POST", "/v1/orders", sent, body={"lines": [{"sku": sku, "quantity": quantity}]})

    async def notify(self, raw: bytes, signature: str | bytes | None) -> httpx.Response:
        """Send a notice to where the sandbox sends its notices."""
        headers = {} if signature is None else {SIGNATURE_HEADER: signature}
        return await self.ask("POST", "/v1/notices/sandbox", headers, content=raw)

    async def state(self) -> State:
        """Everything that the database holds."""
        async with self.system.database.read() as tx:
            found: Any = await tx.execute(text(self._looking))
            return sorted((table, row) for table, row in found)

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """Fail if the block changed any row of any table."""
        before = await self.state()
        yield
        same(before, await self.state())

    async def raw(self, data: bytes, *, then_eof: bool = False, one_answer: bool = False) -> bytes:
        """Send bytes on a connection of their own and read until the server closes it, or only its first answer."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            await writer.drain()
            if then_eof:
                writer.write_eof()
            async with asyncio.timeout(WAIT_S):
                if not one_answer:
                    return await reader.read(-1)
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                return head + await reader.readexactly(int(length[1]) if length else 0)
        except (ConnectionResetError, BrokenPipeError):
            return b""  # the server closed before it had read everything
        finally:
            writer.close()

    async def raw_slowly(self, pieces: Sequence[bytes]) -> bytes:
        """Send one piece after the other, each when the one before has left, until the server closes; its answer."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_S):
                return await reader.read(-1)
        finally:
            writer.close()


@asynccontextmanager
async def facing(system: System) -> AsyncIterator[Counter]:
    """Serve a running system and stand in front of it."""
    async with (
        listening(system) as url,
        httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client,
    ):
        yield Counter(system, url, client)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Counter]:
    """Start a system without workers, so that only requests change its database, and stand in front of it."""
    await migrate_all(settings)
    async with running(settings) as system, facing(system) as counter:
        yield counter


async def fill(system: System, units: int = 40) -> None:
    """Fill the shelves: SKU-1 and SKU-2 can be sold, SKU-EUR costs euros, of SKU-BARE there never was a unit."""
    await stock_up(system, "SKU-1", units)
    await stock_up(system, "SKU-2", units)
    await stock_up(system, "SKU-EUR", units)
    await system.stock.keep_sku(Sku(sku="SKU-EUR", title="Dear", price_minor=PRICE_MINOR, currency="EUR"))
    await system.stock.keep_sku(Sku(sku="SKU-BARE", title="Bare", price_minor=PRICE_MINOR, currency="CNY"))


def same(before: State, after: State) -> None:
    """Fail naming the rows that came and went."""
    gone, came = set(before) - set(after), set(after) - set(before)
    assert not gone, f"the database changed: gone {sorted(gone)}, came {sorted(came)}"
    assert not came, f"the database changed: came {sorted(came)}"
    assert len(before) == len(after), "the database changed: a row stands there twice"


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """Check that an answer is this problem, in full and with the headers that belong to it; gives its detail."""
    told = f"{answer.request.method} {answer.request.url.path[:60]} -> {answer.status_code} {answer.text[:300]}"
    assert answer.status_code == status, f"{told}; expected {status} {code}"
    assert answer.headers["content-type"] == PROBLEM, told
    body = answer.json()
    assert set(body) == {"type", "title", "status", "code", "detail"}, told
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:holdfast:problem:{code}"), told
    for name in ("title", "detail"):
        assert isinstance(body[name], str), told
        assert 0 < len(body[name].strip()) < 2_000, f"a {name} is a sentence: {told}"
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None), told
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None), told
    return str(body["detail"])


def signed(raw: bytes, sent_s: int | str, secret: str = SANDBOX_SECRET) -> str:
    """The sandbox's signature over a notice, made without the code under test."""
    mac = hmac.new(secret.encode(), f"{sent_s}.".encode() + raw, hashlib.sha256).hexdigest()
    return f"t={sent_s},v1={mac}"


def pay_token(link: Mapping[str, Any], secret: str = SANDBOX_SECRET) -> str:
    """What stands at the end of a pay link, made without the code under test."""
    body = base64.urlsafe_b64encode(json.dumps(link).encode()).rstrip(b"=")
    return f"{body.decode()}.{hmac.new(secret.encode(), b'link.' + body, hashlib.sha256).hexdigest()}"


def view_of(answer: httpx.Response) -> OrderView:
    """The order in an answer."""
    assert answer.status_code in {200, 201}, answer.text
    return msgspec.json.decode(answer.content, type=OrderView)


def routes_of(app: Any) -> set[tuple[str, str]]:
    """Every (method, path) that an application answers, the hot ones in front of the framework and those behind."""
    hot = app._app
    routes = set(hot._routes)
    for route in hot._app.routes:
        routes |= {(method, route.path_format) for method in route.methods - {"OPTIONS"}}
    return routes


def server_errors() -> float:
    """How many requests this process has answered with 500 or counted as such."""
    return sum(
        sample.value
        for metric in observe.http_requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["status"] == "500"
    )


def requests_counted() -> float:
    """How many requests this process has counted, whatever became of them."""
    return sum(
        sample.value
        for metric in observe.http_requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


def _look_at_all(dialect: str) -> str:
    looks = []
    for table in TABLES:
        columns = [f'quote("{column.name}")' for column in table.columns]
        row = "t::text" if dialect == "postgresql" else " || '|' || ".join(columns)
        looks.append(f"SELECT '{table.name}', {row} FROM {table.name} t")
    return " UNION ALL ".join(looks)
