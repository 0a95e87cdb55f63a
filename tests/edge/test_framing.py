"""Below the routes: lengths that lie, bodies that never end, heads that are no heads. Sent by hand, byte by byte."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from holdfast.edge.server import _bind, _url
from tests.conftest import eventually
from tests.edge import bad
from tests.edge.bad import Route
from tests.edge.counter import PROBLEM, Counter, fill, requests_counted, server_errors, serving, settings_on

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNKED = "Transfer-Encoding: chunked"


def request(counter: Counter, route: Route, *headers: str | bytes, body: bytes, key: str = "by-hand") -> bytes:
    """A request as it is written, without a length of its own."""
    token = counter.staff()["authorization"]
    head = [f"{route.method} {route.path} HTTP/1.1", "Host: shop", f"Authorization: {token}", "Connection: close"]
    head += ["Content-Type: application/json", f"Idempotency-Key: {key}", "If-Match: *"]
    raw = [each if isinstance(each, bytes) else each.encode() for each in (*head, *headers)]
    return b"\r\n".join([*raw, b"", b""]) + body


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


GOOD = {name: json.dumps(route.good).encode() for name, route in bad.ROUTES.items()}
routes = pytest.mark.parametrize("name", bad.ROUTES)


@routes
async def test_the_request_that_bad_ones_are_made_of_is_good(shared_on_sqlite: Counter, name: str) -> None:
    for headers, body in (
        ([f"Content-Length: {len(GOOD[name])}"], GOOD[name]),
        ([CHUNKED], chunks(GOOD[name])),
        ([CHUNKED], chunks(*(bytes([byte]) for byte in GOOD[name]))),
    ):
        route = bad.ROUTES[name]
        answer = await shared_on_sqlite.raw(request(shared_on_sqlite, route, *headers, body=body, key=f"good-{name}"))
        assert statuses(answer) in ([200], [201])


LIES: dict[str, tuple[list[str], int]] = {
    "negative": (["Content-Length: -1"], 400),
    "not a number": (["Content-Length: many"], 400),
    "with a sign": (["Content-Length: +{n}"], 400),
    "hexadecimal": (["Content-Length: 0x10"], 400),
    "beyond all numbers": (["Content-Length: " + "9" * 40], 400),
    "two that differ": (["Content-Length: {n}", "Content-Length: 1"], 400),
    "a list": (["Content-Length: {n}, {n}"], 400),
    "a length and chunks": (["Content-Length: {n}", CHUNKED], 400),
    "chunks and a length": ([CHUNKED, "Content-Length: {n}"], 400),
    "chunks that are none": ([CHUNKED], 400),
    "an unknown encoding": (["Transfer-Encoding: rot13"], 400),
    "too short": (["Content-Length: 5"], 400),
    "none at all": ([], 400),
    "zero": (["Content-Length: 0"], 400),
    "a blank in the name": (["Content-Length : {n}"], 400),
    "NUL in the value": (["Content-Length: {n}\0"], 400),
}


@routes
@pytest.mark.parametrize("lie", LIES)
async def test_a_length_that_lies_gets_nothing_done(shared_on_sqlite: Counter, name: str, lie: str) -> None:
    headers, status = LIES[lie]
    body = GOOD[name]
    written = [header.format(n=len(body)) for header in headers]
    async with shared_on_sqlite.unchanged():
        answer = await shared_on_sqlite.raw(request(shared_on_sqlite, bad.ROUTES[name], *written, body=body))
        assert statuses(answer)[:1] == [status]
        assert set(statuses(answer)) == {400}  # what is left over is no request either


CUT: dict[str, tuple[str, bytes]] = {
    "a length too long": ("Content-Length: {m}", b""),
    "a length far too long": ("Content-Length: 65000", b""),
    "chunks without an end": (CHUNKED, b""),
    "a chunk cut off": (CHUNKED, b"ff\r\nabc"),
    "an empty chunk cut off": (CHUNKED, b"0\r\n"),
}


@routes
@pytest.mark.parametrize("cut", CUT)
async def test_a_body_cut_off_gets_nothing_done_and_is_no_fault_of_ours(
    shared_on_sqlite: Counter, name: str, cut: str
) -> None:
    header, end = CUT[cut]
    body = chunks(GOOD[name], end=end) if header == CHUNKED else GOOD[name]
    counted, faults = requests_counted(), server_errors()

    async def done() -> bool:
        return requests_counted() > counted

    async with shared_on_sqlite.unchanged():
        written = request(shared_on_sqlite, bad.ROUTES[name], header.format(m=len(body) + 1), body=body)
        answer = await shared_on_sqlite.raw(written, then_eof=True)
        await eventually(done, "the request is given up")
    assert set(statuses(answer)) <= {400}
    assert server_errors() == faults


@routes
async def test_a_body_too_large_is_refused_without_being_read_to_its_end(shared_on_sqlite: Counter, name: str) -> None:
    many = [b" " * 4_096] * 40
    for headers, body in (
        (["Content-Length: 1000000000"], b" " * (bad.BODY_BYTES_MAX + 1)),
        ([CHUNKED], chunks(*many, GOOD[name])),
        ([CHUNKED], chunks(*many, end=b"")),
    ):
        written = request(shared_on_sqlite, bad.ROUTES[name], *headers, body=body)
        async with shared_on_sqlite.unchanged():
            # Kept open: a server that closes while more is coming in makes the client lose the answer.
            answer = await shared_on_sqlite.raw(written.replace(b"Connection: close\r\n", b""), one_answer=True)
        assert statuses(answer) == [413]
        assert PROBLEM.encode() in answer


@routes
async def test_a_body_that_never_comes_is_cut_in_time(tmp_path: Path, name: str) -> None:
    settings = settings_on(f"sqlite:///{tmp_path}/holdfast.db")
    settings = msgspec.structs.replace(settings, http=msgspec.structs.replace(settings.http, request_timeout_ms=150))
    async with serving(settings) as counter:
        await fill(counter.system)
        async with counter.unchanged():
            for header, body in (("Content-Length: 100", b'{"li'), (CHUNKED, chunks(b'{"li', end=b"")), (CHUNKED, b"")):
                answer = await counter.raw(request(counter, bad.ROUTES[name], header, body=body))
                assert statuses(answer) == [503]
                assert PROBLEM.encode() in answer


HEADS: dict[str, bytes] = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"POST /v1/orders HTTP/9.9\r\nHost: shop\r\n\r\n",
    "an unknown method": b"BUY /v1/orders HTTP/1.1\r\nHost: shop\r\n\r\n",
    "a method in small letters": b"post /v1/orders HTTP/1.1\r\nHost: shop\r\n\r\n",
    "a tunnel": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: shop\r\n\r\n",
    "bytes in the path": b"GET /v1/stocks/\xff HTTP/1.1\r\nHost: shop\r\n\r\n",
    "NUL in the path": b"GET /v1/stocks/\0 HTTP/1.1\r\nHost: shop\r\n\r\n",
    "a blank in the path": b"GET /v1/stocks/SKU 1 HTTP/1.1\r\nHost: shop\r\n\r\n",
    "a header without a colon": b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\nhello\r\n\r\n",
    "a header without a name": b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\n: x\r\n\r\n",
    "a folded header": b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\nX: a\r\n b\r\n\r\n",
    "NUL in a header": b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\nX: a\0b\r\n\r\n",
    "a bare carriage return": b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\nX: a\rb\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
async def test_what_is_no_request_is_told_so_and_cut(shared_on_sqlite: Counter, name: str) -> None:
    faults = server_errors()
    async with shared_on_sqlite.unchanged():
        answer = await shared_on_sqlite.raw(HEADS[name], then_eof=True)
    assert set(statuses(answer)) <= {400, 404}
    assert answer == b"" or statuses(answer)
    assert server_errors() == faults


HEAD_MAX = 4_096
LONG_HEADS: dict[str, list[bytes]] = {
    "a long path": [b"GET /v1/stocks/" + b"x" * HEAD_MAX + b" HTTP/1.1\r\nHost: shop\r\n\r\n"],
    "a long header": [b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nX: " + b"x" * HEAD_MAX + b"\r\n\r\n"],
    "many headers": [b"GET /v1/stocks/SKU-1 HTTP/1.1\r\n" + b"X: 12345678\r\n" * 500 + b"\r\n"],
    "a header that never ends": [b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nX: ", *[b"x" * 1_000] * 5],
    "headers that never end": [b"GET /v1/stocks/SKU-1 HTTP/1.1\r\n", *[b"X: 12345678\r\n" * 40] * 8],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Counter]:
    """A server that takes small heads only, and not for long."""
    settings = settings_on(f"sqlite:///{tmp_path_factory.mktemp('narrow')}/holdfast.db")
    http = msgspec.structs.replace(settings.http, head_bytes_max=HEAD_MAX, head_timeout_ms=300)
    async with serving(msgspec.structs.replace(settings, http=http)) as counter:
        await fill(counter.system)
        yield counter


@pytest.mark.parametrize("name", LONG_HEADS)
async def test_a_head_that_is_too_large_is_refused_although_it_has_not_ended(narrow: Counter, name: str) -> None:
    answer = await narrow.raw_slowly(LONG_HEADS[name])
    assert statuses(answer) == [431]
    assert b'"code":"head_too_large"' in answer
    assert PROBLEM.encode() in answer


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\n"])
async def test_a_head_that_does_not_come_is_given_up_in_time(narrow: Counter, sent: bytes) -> None:
    answer = await narrow.raw(sent)
    assert statuses(answer) == [408]
    assert b'"code":"request_timeout"' in answer


async def test_the_next_head_on_a_kept_connection_is_timed_too(narrow: Counter) -> None:
    good = b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\n\r\n"
    assert statuses(await narrow.raw(good + b"GET /v1/st")) == [200, 408]


async def test_a_head_just_within_the_limit_is_taken(narrow: Counter) -> None:
    good = b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\nConnection: close\r\nX: " + b"x" * (HEAD_MAX - 200)
    assert statuses(await narrow.raw(good + b"\r\n\r\n")) == [200]


DOTS = (
    "/v1/orders/..",
    "/v1/orders/.",
    "/v1/stocks/..",
    "/v1/stocks/../orders/77",
    "/../v1/stocks",
    "/./v1/stocks",
    "/v1/./stocks",
)


@pytest.mark.parametrize("path", DOTS)
async def test_dots_in_a_path_lead_nowhere_else(shared_on_sqlite: Counter, path: str) -> None:
    written = f"GET {path} HTTP/1.1\r\nHost: shop\r\nAuthorization: {shared_on_sqlite.staff()['authorization']}\r\n"
    async with shared_on_sqlite.unchanged():
        answer = await shared_on_sqlite.raw(f"{written}Connection: close\r\n\r\n".encode())
    assert statuses(answer) in ([400], [404])
    assert PROBLEM.encode() in answer


async def test_an_upgrade_is_not_made(shared_on_sqlite: Counter) -> None:
    written = b"GET /v1/stocks/SKU-1 HTTP/1.1\r\nHost: shop\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    faults = server_errors()
    async with shared_on_sqlite.unchanged():
        answer = await shared_on_sqlite.raw(written + key, then_eof=True)
    assert 101 not in statuses(answer)
    assert server_errors() == faults


async def test_requests_in_a_row_on_one_connection_are_answered_in_their_order(shared_on_sqlite: Counter) -> None:
    counter = shared_on_sqlite
    first = request(counter, bad.KEEP, f"Content-Length: {len(GOOD['keep'])}", body=GOOD["keep"])
    first = first.replace(b"Connection: close\r\n", b"")
    second = b"GET /v1/stocks/SKU-9 HTTP/1.1\r\nHost: shop\r\n\r\n"
    third = b"GET /healthz/live HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n"
    assert statuses(await counter.raw(first + second + third)) == [200, 404, 200]


async def test_the_listening_socket_says_that_it_is_tcp() -> None:
    # asyncio turns Nagle's algorithm off for a socket whose protocol is TCP, and leaves it on where the protocol is 0:
    # then each answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    import socket

    with _bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


async def test_the_address_is_one_that_a_browser_takes() -> None:
    assert (_url("127.0.0.1", 80), _url("::1", 80)) == ("http://127.0.0.1:80", "http://[::1]:80")
