"""Who may do what: every route times nobody, another buyer, the owner and staff; what is another's does not exist."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, NamedTuple

import httpx
import pytest
import pytest_asyncio
from litestar import Litestar, get

from holdfast.edge.http.app import build_app
from holdfast.edge.http.hot import HotRoutes
from holdfast.edge.http.shell import Shell
from holdfast.edge.http.stock import STOCK
from holdfast.services.payments.sandbox import SIGNATURE_HEADER
from tests.edge.counter import Counter, refused, routes_of, view_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

Role = Literal["nobody", "another", "owner", "staff"]
ROLES: tuple[Role, ...] = ("nobody", "another", "owner", "staff")
OWNER = "owner-7f3a9c"

REFUSED = {401: "unauthorized", 403: "forbidden"}


class Sale(NamedTuple):
    """One order of the owner, and what is known of it."""

    counter: Counter
    order_id: str
    payment_id: str
    pay_url: str

    async def ask(self, role: Role, method: str, path: str, **sent: Any) -> httpx.Response:
        """Ask as somebody."""
        who: dict[str, dict[str, str]] = {
            "nobody": {},
            "another": self.counter.bearer("another"),
            "owner": self.counter.bearer(OWNER),
            "staff": self.counter.bearer("boss", STOCK),
        }
        headers = {**who[role], **sent.pop("headers", {})}
        return await self.counter.ask(method, path, headers, **sent)


class Row(NamedTuple):
    """A route, how to ask it, and what each role is to be answered with."""

    method: str
    path: str
    nobody: int
    another: int
    owner: int
    staff: int
    ask: Callable[[Sale, Role], Any]

    def expected(self, role: Role) -> int:
        return int(getattr(self, role))


def plain(method: str, path: str) -> Callable[[Sale, Role], Any]:
    """Ask for a path that may name the order or its payment."""
    return lambda sale, role: sale.ask(
        role, method, path.format(order_id=sale.order_id, payment_id=sale.payment_id, biz_order_no=sale.order_id)
    )


def place(sale: Sale, role: Role) -> Any:
    body = {"lines": [{"sku": "SKU-2", "quantity": 1}]}
    return sale.ask(role, "POST", "/v1/orders", headers={"idempotency-key": f"by-{role}"}, body=body)


def keep(sale: Sale, role: Role) -> Any:
    body = {"title": "Changed", "priceMinor": 1, "currency": "CNY"}
    return sale.ask(role, "PUT", "/v1/skus/SKU-NEW", body=body)


def receive(sale: Sale, role: Role) -> Any:
    headers = {"idempotency-key": f"by-{role}"}
    return sale.ask(role, "POST", "/v1/stocks/receipts", headers=headers, body={"sku": "SKU-2", "quantity": 1})


def pay(sale: Sale, role: Role) -> Any:
    return sale.ask(role, "POST", sale.pay_url)


async def notify(sale: Sale, role: Role) -> httpx.Response:
    notice = (await sale.counter.ask("POST", sale.pay_url)).json()
    headers = {SIGNATURE_HEADER: notice["signature"]}
    return await sale.ask(role, "POST", "/v1/notices/sandbox", headers=headers, content=notice["body"].encode())


def open_to_all(path: str) -> Row:
    return Row("GET", path, 200, 200, 200, 200, plain("GET", path.replace("{path}", "redoc")))


MATRIX = [
    Row("POST", "/v1/orders", 401, 201, 201, 201, place),
    Row("GET", "/v1/orders/{order_id}", 401, 404, 200, 404, plain("GET", "/v1/orders/{order_id}")),
    Row("POST", "/v1/orders/{order_id}/cancel", 401, 404, 200, 404, plain("POST", "/v1/orders/{order_id}/cancel")),
    Row("GET", "/v1/payments/{payment_id}", 401, 404, 200, 404, plain("GET", "/v1/payments/{payment_id}")),
    Row("GET", "/pay-orders/biz/{biz_order_no}", 401, 404, 200, 404, plain("GET", "/pay-orders/biz/{biz_order_no}")),
    Row("GET", "/v1/stocks/{sku}", 200, 200, 200, 200, plain("GET", "/v1/stocks/SKU-1")),
    Row("GET", "/v1/stocks/receipts", 404, 404, 404, 404, plain("GET", "/v1/stocks/receipts")),  # a SKU of that name
    Row("GET", "/v1/stocks", 401, 403, 403, 200, plain("GET", "/v1/stocks")),
    Row("PUT", "/v1/skus/{sku}", 401, 403, 403, 200, keep),
    Row("POST", "/v1/stocks/receipts", 401, 403, 403, 201, receive),
    # Who holds the link may pay, and a notice is believed for its signature: neither asks for a token.
    Row("POST", "/sandbox/pay/{token}", 200, 200, 200, 200, pay),
    Row("POST", "/v1/notices/sandbox", 200, 200, 200, 200, notify),
    open_to_all("/healthz/live"),
    open_to_all("/healthz/ready"),
    open_to_all("/metrics"),
    open_to_all("/schema"),
    open_to_all("/schema/openapi.json"),
    open_to_all("/schema/openapi.yaml"),
    open_to_all("/schema/openapi.yml"),
    open_to_all("/schema/swagger"),
    open_to_all("/schema/redoc"),
    open_to_all("/schema/elements"),
    open_to_all("/schema/rapidoc"),
    open_to_all("/schema/oauth2-redirect.html"),
    Row("GET", "/schema/{path}", 404, 404, 404, 404, plain("GET", "/schema/{{order_id}}")),
]
OF_AN_ORDER = [row for row in MATRIX if "{order_id}" in row.path]


@pytest_asyncio.fixture(loop_scope="module")
async def sale(shared: Counter) -> AsyncIterator[Sale]:
    """A new order of the owner."""
    key = f"sale-{shared.system.ids.next()}"
    view = view_of(await shared.place(OWNER, key=key, quantity=1))
    assert view.payment.pay_url is not None
    yield Sale(shared, view.id, view.payment.id, view.payment.pay_url)
    await shared.ask("POST", f"/v1/orders/{view.id}/cancel", shared.bearer(OWNER))  # the units are needed again


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("row", MATRIX, ids=lambda row: f"{row.method} {row.path}")
async def test_each_role_gets_what_is_its_own(sale: Sale, row: Row, role: Role) -> None:
    before = await sale.counter.state()
    answer: httpx.Response = await row.ask(sale, role)
    assert answer.status_code == row.expected(role), answer.text[:300]
    if answer.status_code < 400 or row.path.startswith("/schema"):
        return
    code = REFUSED.get(answer.status_code, answer.json()["code"])
    refused(answer, answer.status_code, code)
    assert await sale.counter.state() == before
    told = answer.text + json.dumps(dict(answer.headers))
    for secret in (OWNER, sale.order_id, sale.payment_id, sale.pay_url, "SKU-", "CNY", "pending", "boss"):
        assert secret not in told


@pytest.mark.parametrize("role", ["another", "staff"])
@pytest.mark.parametrize("row", OF_AN_ORDER, ids=lambda row: row.method)
async def test_anothers_order_looks_like_one_that_never_was(sale: Sale, row: Row, role: Role) -> None:
    async with sale.counter.unchanged():
        anothers: httpx.Response = await row.ask(sale, role)
        nobodys: httpx.Response = await row.ask(sale._replace(order_id="77"), role)
    assert (anothers.status_code, anothers.content) == (nobodys.status_code, nobodys.content)
    assert dict(anothers.headers) | {"date": ""} == dict(nobodys.headers) | {"date": ""}
    refused(anothers, 404, "order_not_found")


@pytest.mark.parametrize("status", ["paid", "cancelled"])
async def test_nothing_tells_another_what_became_of_an_order(sale: Sale, status: str) -> None:
    counter = sale.counter
    if status == "cancelled":
        await counter.ask("POST", f"/v1/orders/{sale.order_id}/cancel", counter.bearer(OWNER))
    else:
        await notify(sale, "nobody")
    for row in OF_AN_ORDER:
        async with counter.unchanged():
            refused(await row.ask(sale, "another"), 404, "order_not_found")


async def test_a_buyers_key_replays_nothing_of_another(sale: Sale) -> None:
    key = {"idempotency-key": "the-same-key"}
    body = {"lines": [{"sku": "SKU-2", "quantity": 1}]}
    first = await sale.ask("owner", "POST", "/v1/orders", headers=key, body=body)
    second = await sale.ask("another", "POST", "/v1/orders", headers=key, body=body)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
    assert "idempotent-replayed" not in second.headers
    third = await sale.ask(
        "staff", "POST", "/v1/orders", headers=key, body={"lines": [{"sku": "SKU-9", "quantity": 1}]}
    )
    refused(third, 422, "unknown_sku")  # and not idempotency_key_reused, which would tell that somebody used it


async def test_names_that_look_alike_are_different_buyers(sale: Sale) -> None:
    counter = sale.counter
    for name in (OWNER.upper(), f"{OWNER}x", OWNER[:-1], f"{OWNER}.", "%", "*", "_" * len(OWNER), f"{OWNER}'--"):
        async with counter.unchanged():
            for row in OF_AN_ORDER:
                path = row.path.format(order_id=sale.order_id)
                refused(await counter.ask(row.method, path, counter.bearer(name)), 404, "order_not_found")


@pytest.mark.parametrize(
    "scope", ["", "stock", "stock:read", "stock:write2", "STOCK:WRITE", "stock:writ", "stock: write", "*"]
)
async def test_only_the_very_scope_makes_staff(sale: Sale, scope: str) -> None:
    counter = sale.counter
    async with counter.unchanged():
        refused(await counter.ask("GET", "/v1/stocks", counter.bearer("boss", scope)), 403, "forbidden")
    others = counter.bearer("boss", f"orders:read {STOCK} x")
    assert (await counter.ask("GET", "/v1/stocks", others)).status_code == 200


async def test_a_detail_of_403_names_the_scope_that_is_needed(sale: Sale) -> None:
    assert STOCK in refused(await sale.ask("owner", "GET", "/v1/stocks"), 403, "forbidden")


# --- No route without a row -------------------------------------------------------------------------------------------


async def test_every_route_of_the_application_is_in_the_matrix(shared: Counter) -> None:
    routes = routes_of(build_app(shared.system))
    assert routes == {(row.method, row.path) for row in MATRIX}


async def test_a_new_route_would_be_seen_whichever_way_it_is_added(shared: Counter) -> None:
    @get("/new/{name:str}")
    async def new() -> None: ...

    async def hot_new(*_: Any) -> Any: ...

    clock = shared.system.clock
    app = Litestar([new], openapi_config=None)
    routes = routes_of(Shell(HotRoutes(app, {("PATCH", "/hot"): hot_new}, 1_024), clock, 1.0))
    assert routes == {("GET", "/new/{name}"), ("PATCH", "/hot")}
