"""Anything at all, sent everywhere: never a fault of ours, never a changed row unless the answer says so."""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable
from typing import Any
from urllib.parse import quote_from_bytes
from weakref import WeakKeyDictionary

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.edge import bad
from tests.edge.bad import NOTICE, Route, fuzz
from tests.edge.counter import Counter, State, refused, same, signed

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSALS = {400, 401, 403, 404, 405, 409, 413, 422}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 1_000_002)
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["SKU-1", "SKU-2", "SKU-9", "main", "CNY", "\0", "\ud800", "a\n", "x" * 65, ""])
)
NAMES = st.text(max_size=5) | st.sampled_from(
    ["lines", "sku", "quantity", "warehouse", "title", "priceMinor", "currency", "price_minor", "status", "buyer"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
CODES = st.sampled_from(["SKU-1", "SKU-2", "SKU-EUR", "SKU-BARE", "SKU-9"]) | SCALARS
LINE = st.fixed_dictionaries({"sku": CODES, "quantity": st.integers(1, 3) | SCALARS})

serial = itertools.count()
known: WeakKeyDictionary[Counter, State] = WeakKeyDictionary()  # what a database held after the last refusal


def shaped(good: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Objects of about the right shape with anything in them."""
    if "lines" in good:
        return st.fixed_dictionaries({"lines": st.lists(LINE | VALUES, max_size=4)})
    return st.fixed_dictionaries({name: st.just(value) | SCALARS for name, value in good.items()})


@st.composite
def damaged(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """A good body with some bytes changed, added or left out."""
    content = bytearray(json.dumps(good).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


def anything(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Bodies: of the right shape, of any shape, damaged, and no JSON at all."""
    values = shaped(good) | VALUES
    return st.one_of(
        values.map(lambda value: json.dumps(value).encode()),
        values.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
        damaged(good),
        st.binary(max_size=200),
    )


async def judged(counter: Counter, request: Awaitable[httpx.Response]) -> httpx.Response:
    """Send, and check that a refusal is a proper one and changed nothing."""
    before = known.pop(counter, None) or await counter.state()
    answer = await request
    if answer.status_code not in {200, 201}:
        assert answer.status_code in REFUSALS, f"{answer.status_code}: {answer.text[:500]}"
        refused(answer, answer.status_code, answer.json()["code"])
        after = await counter.state()
        same(before, after)
        known[counter] = after
    return answer


async def send(counter: Counter, route: Route, content: bytes) -> None:
    """Send a body to a route with everything else in order."""
    who = counter.staff() if route.staff else counter.bearer("ann")
    headers = {**who, "idempotency-key": f"fuzz-{next(serial)}"}
    await judged(counter, counter.ask(route.method, route.path, headers, content=content))


@fuzz()
@given(content=anything(bad.PLACE.good))
async def test_no_body_breaks_placing(shared: Counter, content: bytes) -> None:
    await send(shared, bad.PLACE, content)


@fuzz()
@given(content=anything(bad.KEEP.good))
async def test_no_body_breaks_keeping_a_sku(shared: Counter, content: bytes) -> None:
    await send(shared, bad.KEEP, content)


@fuzz()
@given(content=anything(bad.RECEIVE.good))
async def test_no_body_breaks_a_receipt(shared: Counter, content: bytes) -> None:
    await send(shared, bad.RECEIVE, content)


@fuzz(100)
@given(content=anything(bad.PLACE.good))
async def test_no_body_breaks_cancelling_and_paying(shared_on_sqlite: Counter, content: bytes) -> None:
    cancel = shared_on_sqlite.ask("POST", "/v1/orders/77/cancel", shared_on_sqlite.bearer("ann"), content=content)
    assert (await judged(shared_on_sqlite, cancel)).status_code == 404
    pay = shared_on_sqlite.ask("POST", "/sandbox/pay/no.link", content=content)
    assert (await judged(shared_on_sqlite, pay)).status_code == 400


@fuzz(100)
@given(content=anything(NOTICE))
async def test_no_body_breaks_a_notice_that_nobody_signed(shared_on_sqlite: Counter, content: bytes) -> None:
    for signature in (None, signed(content, shared_on_sqlite.now_s, "somebody else's secret")):
        answer = await judged(shared_on_sqlite, shared_on_sqlite.notify(content, signature))
        assert (answer.status_code, answer.json()["code"]) == (400, "forged_notice")


@fuzz()
@given(content=anything(NOTICE))
async def test_no_body_breaks_a_notice_that_the_provider_signed(shared: Counter, content: bytes) -> None:
    answer = await judged(shared, shared.notify(content, signed(content, shared.now_s)))
    if answer.status_code != 200:
        assert (answer.status_code, answer.json()["code"]) == (400, "forged_notice")


HEADER = st.lists(st.sampled_from([*range(0x20, 0x7F), *range(0x80, 0x100), 0x09])).map(
    lambda each: bytes(each).strip()
)


@fuzz(100)
@given(key=HEADER)
async def test_no_idempotency_key_breaks_a_route(shared_on_sqlite: Counter, key: bytes) -> None:
    good = 0 < len(key) <= 128 and all(0x21 <= byte <= 0x7E for byte in key)
    for route in (bad.PLACE, bad.RECEIVE):
        headers: dict[str, str | bytes] = {**shared_on_sqlite.staff(), "idempotency-key": key}
        content = json.dumps(route.good).encode()
        answer = await judged(
            shared_on_sqlite, shared_on_sqlite.ask(route.method, route.path, headers, content=content)
        )
        assert answer.status_code in ({201, 409} if good else {400})


@fuzz(60)
@given(token=HEADER)
async def test_no_authorization_breaks_a_route(shared_on_sqlite: Counter, token: bytes) -> None:
    for scheme in (b"", b"Bearer "):
        headers = {"authorization": (scheme + token).strip(), "idempotency-key": b"k"}
        for path in ("/v1/orders", "/v1/stocks/receipts"):
            answer = await judged(shared_on_sqlite, shared_on_sqlite.ask("POST", path, headers, body=bad.PLACE.good))
            assert answer.status_code == 401


@fuzz(100)
@given(signature=HEADER)
async def test_no_signature_breaks_a_notice(shared_on_sqlite: Counter, signature: bytes) -> None:
    answer = await judged(shared_on_sqlite, shared_on_sqlite.notify(json.dumps(NOTICE).encode(), signature))
    assert (answer.status_code, answer.json()["code"]) == (400, "forged_notice")


@fuzz(100)
@given(part=st.binary(min_size=1, max_size=40) | st.text(min_size=1, max_size=40).map(str.encode))
async def test_no_path_breaks_a_route(shared: Counter, part: bytes) -> None:
    quoted = quote_from_bytes(part, safe="").replace(".", "%2E")
    async with shared.unchanged():
        for method, path, headers in (
            ("GET", f"/v1/orders/{quoted}", shared.bearer("ann")),
            ("POST", f"/v1/orders/{quoted}/cancel", shared.bearer("ann")),
            ("GET", f"/v1/stocks/{quoted}", {}),
            ("POST", f"/sandbox/pay/{quoted}", {}),
            ("POST", f"/v1/notices/{quoted}", {}),
            ("PUT", f"/{quoted}", {}),
        ):
            answer = await shared.ask(method, path, headers)
            assert answer.status_code in REFUSALS
            refused(answer, answer.status_code, answer.json()["code"])
