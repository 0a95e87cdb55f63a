"""Bad input on every route: always a problem that says what is wrong, never a fault of ours, never a changed row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import unquote

import httpx
import pytest
from sqlalchemy import text

from tests.edge import bad
from tests.edge.bad import BAD_IDS, BAD_KEYS, BAD_SKUS, KEY, Bad, Route
from tests.edge.counter import TABLES, Counter, refused, view_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODIES = [
    pytest.param(route, each, id=f"{name}: {each.name}")
    for name, route in bad.ROUTES.items()
    for each in bad.bodies(route)
]


async def send(
    counter: Counter, route: Route, content: bytes | None, headers: Mapping[str, str | bytes] | None = None
) -> httpx.Response:
    """Send a body to a route with everything else in order."""
    who = counter.staff() if route.staff else counter.bearer("ann")
    return await counter.ask(
        route.method, route.path, {**who, "idempotency-key": KEY, **(headers or {})}, content=content
    )


# --- The table itself -------------------------------------------------------------------------------------------------


async def test_the_look_at_the_database_misses_no_table(shared: Counter) -> None:
    catalogue = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table'",
        "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
    }
    async with shared.system.database.read() as tx:
        found = {row[0] for row in await tx.execute(text(catalogue[shared.system.database.dialect]))}
    assert {name for name in found if not name.endswith("_version")} == {table.name for table in TABLES}


async def test_the_look_at_the_database_sees_every_change(shared: Counter) -> None:
    before = await shared.state()
    shelves = {row for table, row in before if table == "stock_level"}
    assert len(shelves) == 3
    with pytest.raises(AssertionError, match="the database changed"):
        async with shared.unchanged():
            await shared.place("eve", key="seen", sku="SKU-EUR")
    assert len(await shared.state()) > len(before)


async def test_the_good_bodies_that_bad_ones_are_made_of_are_good(shared: Counter) -> None:
    for route in bad.ROUTES.values():
        headers = {"idempotency-key": f"good-{route.path}"}
        answer = await send(shared, route, json.dumps(route.good).encode(), headers)
        assert answer.status_code in {200, 201}, answer.text


# --- Bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "body"), BODIES)
async def test_a_bad_body_is_refused(shared_on_sqlite: Counter, route: Route, body: Bad) -> None:
    async with shared_on_sqlite.unchanged():
        refused(await send(shared_on_sqlite, route, body.content), body.status, body.code)


@pytest.mark.parametrize("route", bad.ROUTES.values(), ids=bad.ROUTES)
async def test_no_bad_body_reaches_any_database(shared: Counter, route: Route) -> None:
    taken = {}
    async with shared.unchanged():
        for body in bad.bodies(route):
            answer = await send(shared, route, body.content)
            if answer.status_code != body.status:
                taken[body.name] = answer.text[:200]
    assert taken == {}


@pytest.mark.parametrize("body", [pytest.param(each, id=each.name) for each in bad.lines()])
async def test_lines_that_are_good_one_by_one_may_be_bad_together(shared: Counter, body: Bad) -> None:
    async with shared.unchanged():
        refused(await send(shared, bad.PLACE, body.content), 400, "invalid_input")


@pytest.mark.parametrize("route", bad.ROUTES.values(), ids=bad.ROUTES)
async def test_no_column_of_the_database_can_be_set_by_naming_it(shared: Counter, route: Route) -> None:
    tried = 0
    async with shared.unchanged():
        for body in bad.assignments(route):
            answer = await send(shared, route, body.content)
            assert answer.status_code == 400, f"{body.name} was taken: {answer.text}"
            refused(answer, 400, "invalid_input")
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("route", bad.ROUTES.values(), ids=bad.ROUTES)
async def test_a_detail_names_the_field_that_is_wrong(shared: Counter, route: Route) -> None:
    for at, _ in route.numbers:
        for body in bad.bodies(route):
            if body.name == f"{'/'.join(map(str, at))} is -1":
                assert str(at[-1]) in refused(await send(shared, route, body.content), 400, "invalid_input")


async def test_routes_that_take_no_body_do_not_mind_a_bad_one(shared: Counter) -> None:
    async with shared.unchanged():
        for body in bad.documents(bad.PLACE.good):
            cancel = await shared.ask("POST", "/v1/orders/77/cancel", shared.bearer("ann"), content=body.content)
            refused(cancel, 404, "order_not_found")
            refused(await shared.ask("POST", "/sandbox/pay/no.link", content=body.content), 400, "invalid_input")
            assert (await shared.ask("GET", "/v1/stocks/SKU-1", content=body.content)).status_code == 200


# --- Headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
@pytest.mark.parametrize("route", [bad.PLACE, bad.RECEIVE], ids=["place", "receive"])
async def test_a_bad_idempotency_key_is_refused(shared: Counter, route: Route, key: str | bytes | None) -> None:
    who = shared.staff() if route.staff else shared.bearer("ann")
    headers: dict[str, str | bytes] = {**who} if key is None else {**who, "idempotency-key": key}
    async with shared.unchanged():
        answer = await shared.ask(route.method, route.path, headers, content=json.dumps(route.good).encode())
        detail = refused(answer, 400, "invalid_input")
    assert "idempotency" in detail.lower()


TOKEN_NAMES = list(bad.tokens({"sub": "ann", "exp": 0, "scope": ""}))
SIGNED_IN = {
    "place": ("POST", "/v1/orders", bad.PLACE),
    "read": ("GET", "/v1/orders/77", None),
    "cancel": ("POST", "/v1/orders/77/cancel", None),
    "levels": ("GET", "/v1/stocks", None),
    "keep": ("PUT", "/v1/skus/SKU-1", bad.KEEP),
    "receive": ("POST", "/v1/stocks/receipts", bad.RECEIVE),
}


@pytest.mark.parametrize("name", TOKEN_NAMES)
async def test_a_bad_token_is_nobodys(shared_on_sqlite: Counter, name: str) -> None:
    counter = shared_on_sqlite
    token = bad.tokens(counter.claims("ann"))[name]
    headers: dict[str, str | bytes] = {"idempotency-key": KEY}
    if token is not None:
        headers["authorization"] = token
    async with counter.unchanged():
        for method, path, route in SIGNED_IN.values():
            content = None if route is None else json.dumps(route.good).encode()
            answer = await counter.ask(method, path, headers, content=content)
            detail = refused(answer, 401, "unauthorized")
            assert "ann" not in detail


async def test_the_claims_that_bad_tokens_are_made_of_are_good(shared_on_sqlite: Counter) -> None:
    answer = await shared_on_sqlite.ask("GET", "/v1/stocks", shared_on_sqlite.staff())
    assert answer.status_code == 200
    for scheme in ("bearer", "BEARER", "Bearer "):
        token = shared_on_sqlite.staff()["authorization"].replace("Bearer", scheme)
        assert (await shared_on_sqlite.ask("GET", "/v1/stocks", {"authorization": token})).status_code == 200


@pytest.mark.parametrize("each", SIGNED_IN.values(), ids=SIGNED_IN)
async def test_who_asks_is_looked_at_first_then_the_headers_then_the_body(
    shared: Counter, each: tuple[str, str, Route | None]
) -> None:
    method, path, route = each
    wrong = b"[" * bad.NESTING
    async with shared.unchanged():
        refused(await shared.ask(method, path, content=wrong), 401, "unauthorized")
        refused(await shared.ask(method, path, content=b"x" * 70_000), 401, "unauthorized")
        if route is not None and route.staff:
            refused(await shared.ask(method, path, shared.bearer("ann"), content=wrong), 403, "forbidden")
        if route is bad.PLACE or route is bad.RECEIVE:
            who = shared.staff()
            detail = refused(await shared.ask(method, path, who, content=wrong), 400, "invalid_input")
            assert "Idempotency-Key" in detail


# --- Paths ------------------------------------------------------------------------------------------------------------


def lost(part: str) -> bool:
    """Whether a path with this part leads to no route at all."""
    name = unquote(part.partition("?")[0])
    return "/" in name or name == ""


@pytest.mark.parametrize("order_id", BAD_IDS, ids=lambda each: each[:40])
async def test_what_is_no_id_names_no_order(shared: Counter, order_id: str) -> None:
    code = "not_found" if lost(order_id) else "order_not_found"
    part, query, rest = order_id.partition("?")
    async with shared.unchanged():
        refused(await shared.ask("GET", f"/v1/orders/{order_id}", shared.bearer("ann")), 404, code)
        refused(await shared.ask("POST", f"/v1/orders/{part}/cancel{query}{rest}", shared.bearer("ann")), 404, code)


async def test_an_order_has_one_id_and_no_other_spelling_of_it(shared: Counter) -> None:
    placed = view_of(await shared.place("ann", key="spelt", sku="SKU-EUR"))
    assert (await shared.ask("GET", f"/v1/orders/{placed.id}", shared.bearer("ann"))).status_code == 200
    spellings = [f"0{placed.id}", f"+{placed.id}", f"{placed.id}%00", f"{placed.id}%20", f"%20{placed.id}"]
    spellings += [f"{placed.id}.0", f"{placed.id}%0A", f"{placed.id[:-1]}%EF%BC%91", f"{int(placed.id):x}"]
    spellings += [str(int(placed.id) + 2**64), f"-{placed.id}", f"{placed.id}e0", f"{int(placed.id):_}"]
    async with shared.unchanged():
        for spelling in spellings:
            read = await shared.ask("GET", f"/v1/orders/{spelling}", shared.bearer("ann"))
            refused(read, 404, "order_not_found")
            cancel = await shared.ask("POST", f"/v1/orders/{spelling}/cancel", shared.bearer("ann"))
            refused(cancel, 404, "order_not_found")


@pytest.mark.parametrize("sku", BAD_SKUS, ids=lambda each: each[:40])
async def test_a_sku_in_the_path_is_held_to_the_same_rules(shared: Counter, sku: str) -> None:
    status, code = (404, "not_found") if lost(sku) else (400, "invalid_input")
    async with shared.unchanged():
        refused(await shared.ask("GET", f"/v1/stocks/{sku}"), status, code)
        refused(await shared.ask("PUT", f"/v1/skus/{sku}", shared.staff(), body=bad.KEEP.good), status, code)


UNKNOWN = (
    *("/", "//", "/v1", "/v2/orders", "/V1/orders", "/v1/Orders", "/v1//order", "//v1/orders", "/v1/order"),
    *("/orders", "/v1/orders/1/pay", "/v1/orders/1/cancel/2", "/v1/notices", "/v1/notices/other"),
    *("/v1/notices/sandbox/1", "/sandbox", "/sandbox/pay", "/sandbox/pay/a/b", "/v1/skus", "/v1/skus/a/b"),
    *(
        "/metrics/x",
        "/healthz",
        "/admin",
        "/console",
        "/docs",
        "/favicon.ico",
        "/.env",
        "/.git/config",
    ),
    *("/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%00", "/%ff", "/v1/orders%00", "/v1/orders%20"),
    *("/v1/orders;x=1", "/v1%2Forders%2F1%2Fcancel%2Fx", "/" + "x" * 20_000, "/*", "/~"),
)


@pytest.mark.parametrize("path", UNKNOWN, ids=lambda each: each[:40])
async def test_an_unknown_path_is_not_found_whatever_the_method(shared_on_sqlite: Counter, path: str) -> None:
    counter = shared_on_sqlite
    async with counter.unchanged():
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            answer = await counter.ask(method, path, counter.staff() | {"idempotency-key": KEY}, body=bad.PLACE.good)
            assert (method, answer.status_code) == (method, 404)
            refused(answer, 404, "not_found")
        head = await counter.ask("HEAD", path)
        assert (head.status_code, head.content) == (404, b"")


async def test_an_unknown_page_of_the_schema_is_a_problem_like_any_other(shared_on_sqlite: Counter) -> None:
    refused(await shared_on_sqlite.ask("GET", "/schema/nothing"), 404, "not_found")


METHODS = {
    "/v1/orders": {"GET", "POST"},
    "/v1/orders/77": {"GET"},
    "/v1/orders/77/cancel": {"POST"},
    "/v1/stocks/SKU-1": {"GET"},
    "/v1/stocks": {"GET"},
    "/v1/skus/SKU-1": {"PUT"},
    "/v1/stocks/receipts": {"GET", "POST"},
    "/v1/notices/sandbox": {"POST"},
    "/sandbox/pay/a.b": {"POST"},
    "/healthz/live": {"GET"},
    "/healthz/ready": {"GET"},
    "/metrics": {"GET"},
}


def allowed(answer: httpx.Response) -> set[str]:
    return {method.strip() for method in answer.headers.get("allow", "").split(",")} - {""}


@pytest.mark.parametrize(("path", "methods"), METHODS.items(), ids=METHODS)
async def test_a_wrong_method_is_told_the_right_ones(shared_on_sqlite: Counter, path: str, methods: set[str]) -> None:
    counter = shared_on_sqlite
    async with counter.unchanged():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - methods:
            answer = await counter.ask(method, path, counter.staff() | {"idempotency-key": KEY}, body=bad.PLACE.good)
            assert (method, answer.status_code) == (method, 405)
            refused(answer, 405, "method_not_allowed")
            assert allowed(answer) - {"OPTIONS", "HEAD"} == methods
        head = await counter.ask("HEAD", path)
        assert head.content == b""
        assert head.status_code == 405 or ("GET" in methods and head.status_code < 500)
        options = await counter.ask("OPTIONS", path)
        assert (options.status_code, options.content) == (204, b"")
        assert allowed(options) - {"OPTIONS", "HEAD"} == methods
