"""What nobody should be able to send: documents, values, keys, tokens and paths, generated from a few good ones."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, settings

from holdfast.edge.http.stock import STOCK
from tests.edge.counter import TABLES, TOKEN_SECRET

NESTING = 10_000
BODY_BYTES_MAX = 65_536
KEY = "key-of-bad-input"
OTHER_SECRET = "not-the-shops-secret-but-long-enough"

Step = str | int


class Route(NamedTuple):
    """A route that takes a JSON body, with a good one and what its values may be."""

    method: str
    path: str
    staff: bool
    good: dict[str, Any]
    codes: tuple[tuple[Step, ...], ...] = ()  # where a SKU or warehouse stands
    titles: tuple[tuple[Step, ...], ...] = ()
    currencies: tuple[tuple[Step, ...], ...] = ()
    numbers: tuple[tuple[tuple[Step, ...], int], ...] = ()  # where, and the highest
    optional: tuple[Step, ...] = ()
    also: tuple[str, ...] = ()  # further fields that may be given
    lowest: int = 1  # of the numbers


PLACE = Route(
    "POST",
    "/v1/orders",
    False,
    {"lines": [{"sku": "SKU-1", "quantity": 1}]},
    codes=(("lines", 0, "sku"),),
    numbers=((("lines", 0, "quantity"), 100),),
    also=("priceMinor",),
)
KEEP = Route(
    "PUT",
    "/v1/skus/SKU-1",
    True,
    {"title": "A ticket", "priceMinor": 500, "currency": "CNY"},
    titles=(("title",),),
    currencies=(("currency",),),
    numbers=((("priceMinor",), 1_000_000_000_000),),
    also=("orderMax", "buyerMax", "timeOutMs"),
    lowest=0,
)
RECEIVE = Route(
    "POST",
    "/v1/stocks/receipts",
    True,
    {"sku": "SKU-1", "quantity": 5, "warehouse": "main"},
    codes=(("sku",), ("warehouse",)),
    numbers=((("quantity",), 1_000_000),),
    optional=("warehouse",),
)
ROUTES = {"place": PLACE, "keep": KEEP, "receive": RECEIVE}


NOTICE = {
    "eventId": "evt-1",
    "merchantId": "holdfast-demo",
    "paymentId": "77",
    "tradeNo": "trade-1",
    "amountMinor": 1_000,
    "currency": "CNY",
    "paidAt": "2026-01-31T08:30:00Z",
}


class Bad(NamedTuple):
    """A bad body and what it is to be answered with."""

    name: str
    content: bytes
    status: int = 400
    code: str = "invalid_input"


NOT_A_STRING = ("5", "1.5", "true", "null", "[]", "{}", '["SKU-1"]', '{"sku":"SKU-1"}')
NOT_A_NUMBER = (
    *('"1"', '"NaN"', '""', "true", "false", "null", "[]", "{}", "[1]", "0x10", "01", "+1", "1_000", "1,5", ".5"),
)
NOT_WHOLE = ("1.5", "1.0", "1e0", "-1.5", "1e-3", "NaN", "-NaN", "Infinity", "-Infinity", "1e999", "-1e999")
TOO_SMALL = ("0", "-0", "-1", "-9223372036854775809")
TOO_LARGE = (str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(10**30), "9" * 5_000)

LONE_SURROGATES = (rb'"\ud800"', rb'"a\udc00"', rb'"\ud800\u0041"', b'"\xed\xa0\x80"')
NOT_UTF8 = (b'"\xff"', b'"\xc0\x80"', b'"\xf5\x80\x80\x80"', b'"caf\xe9"')
CONTROLS = ("\0", "a\0", "\0a", "a\n", "\na", "a\r\n", "a\nb", "a\tb", "\x1b[31ma", "a\x7f", "a\x9b31m")
BAD_CODES = (
    *("", " ", "a b", " a", "a ", "-a", ".a", "_a", "a/b", "../a", "a\\b", "a%00", "a'--", 'a"', "a;b", "<a>"),
    *("a,b", "\xe9", "\uff41", "\u0661", "a\u200b", "a\u202eb", "票", "x" * 65, "x" * 10_000),
)
BAD_CURRENCIES = ("", "CN", "CNYX", "cny", "C1Y", " CNY", "CNY ", "\uff23\uff2e\uff39", "CÑY", "123", "€")


def fuzz(examples: int = 200) -> Callable[[Any], Any]:
    """The same examples in each run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # the examples are small as they are
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def bodies(route: Route) -> Iterator[Bad]:
    """Every bad body of a route."""
    yield from documents(route.good)
    for at in _fields(route.good):
        where = "/".join(map(str, at))
        if at[-1] not in route.optional:
            yield Bad(f"without {where}", json.dumps(_without(route.good, at)).encode())
        for raw in ("null", '"x"', "7", "true", "[[]]", "[null]", '[{"a":1}]'):
            if not _fits(route.good, at, raw):
                yield Bad(f"{where} is {raw}", _with(route.good, at, raw.encode()))
    for at in (*route.codes, *route.titles, *route.currencies):
        yield from _strings(route.good, at)
    for at in route.codes:
        yield from (_text(route.good, at, value) for value in BAD_CODES)
    for at in route.currencies:
        yield from (_text(route.good, at, value) for value in BAD_CURRENCIES)
    for at in route.titles:
        yield from (_text(route.good, at, value) for value in ("", "x" * 201, "x" * 10_000))
    for at, highest in route.numbers:
        too_large = [raw for raw in (str(highest + 1), *TOO_LARGE) if len(raw) > 20 or int(raw) > highest]
        too_small = [raw for raw in TOO_SMALL if int(raw) < route.lowest]
        for raw in (*NOT_A_NUMBER, *NOT_WHOLE, *too_small, *too_large):
            yield Bad(f"{'/'.join(map(str, at))} is {raw[:30]}", _with(route.good, at, raw.encode()))


def lines() -> Iterator[Bad]:
    """Orders whose every line is good but which are not good as a whole."""
    many = [{"sku": f"SKU-{number}", "quantity": 1} for number in range(51)]
    yield Bad("no line", b'{"lines":[]}')
    yield Bad("too many lines", json.dumps({"lines": many}).encode())
    yield Bad("twice the same SKU", json.dumps({"lines": [{"sku": "SKU-1", "quantity": 1}] * 2}).encode())
    yield Bad("one bad line of two", b'{"lines":[{"sku":"SKU-1","quantity":1},{"sku":"SKU-2","quantity":0}]}')
    yield Bad(
        "a line twice, the first bad", b'{"lines":[{"sku":"","quantity":1}],"lines":[{"sku":"SKU-1","quantity":1}]}'
    )
    yield Bad(
        "a line twice, the last bad", b'{"lines":[{"sku":"SKU-1","quantity":1}],"lines":[{"sku":"","quantity":1}]}'
    )


def assignments(route: Route) -> Iterator[Bad]:
    """A good body with one field more, named as any column of the database: its price, its state, its owner."""
    for at in _objects(route.good):
        target: Any = route.good
        for step in at:
            target = target[step]
        for name in sorted(_column_names() - set(target) - set(route.also)):
            body = copy.deepcopy(route.good)
            inner: Any = body
            for step in at:
                inner = inner[step]
            inner[name] = 1
            yield Bad(f"{'/'.join(map(str, (*at, name)))}", json.dumps(body).encode())


def tokens(claims: Mapping[str, Any]) -> dict[str, str | bytes | None]:
    """Authorization headers that name nobody, made from the claims of somebody."""
    good = _jwt(claims)
    header, payload, signature = good.split(".")
    later = claims["exp"] + 60
    plain = _b64(b'{"alg":"HS256","typ":"JWT"}')
    odd: dict[str, Mapping[str, Any]] = {
        "expired": {"exp": claims["exp"] - 7_200},
        "expired just now": {"exp": claims["exp"] - 3_600},
        "expired long ago": {"exp": 0},
        "expired before time": {"exp": -1},
        "exp is true": {"exp": True},
        "exp is a string": {"exp": str(later)},
        "exp is null": {"exp": None},
        "exp is a list": {"exp": [later]},
        "exp is no number": {"exp": float("nan")},
        "exp is infinite": {"exp": float("inf")},
        "not valid yet": {"nbf": later},
        "for somebody else": {"aud": "another-shop"},
        "sub is a number": {"sub": 7},
        "sub is null": {"sub": None},
        "sub is a list": {"sub": ["ann"]},
        "sub is empty": {"sub": ""},
        "sub is blank": {"sub": " "},
        "sub with NUL": {"sub": "ann\0"},
        "sub with a newline": {"sub": "ann\n"},
        "sub with a line more": {"sub": "ann\nboss"},
        "sub with an escape": {"sub": "\x1b[31mann"},
        "sub beyond ASCII": {"sub": "änn"},
        "sub with a lone surrogate": {"sub": "\ud800"},
        "sub too long": {"sub": "a" * 129},
        "scope is a list": {"scope": [STOCK]},
        "scope is a number": {"scope": 1},
        "scope is null": {"scope": None},
    }
    found: dict[str, str | bytes | None] = {
        f"claims: {name}": f"Bearer {_jwt({**claims, **more})}" for name, more in odd.items()
    }
    for name in ("exp", "sub"):
        found[f"claims: no {name}"] = f"Bearer {_jwt({key: value for key, value in claims.items() if key != name})}"
    for name, raw in {
        "a list": b"[]",
        "null": b"null",
        "a string": b'"ann"',
        "not JSON": b"ann",
        "not UTF-8": b'{"sub":"\xff"}',
        "deep": b"[" * NESTING,
        "empty": b"",
    }.items():
        found[f"payload: {name}"] = f"Bearer {_signed(plain, _b64(raw))}"
    for algorithm in ("none", "None", "NONE", "", "HS512", "HS384", "RS256", "ES256", "hs256", "HS256 "):
        head = _b64(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
        found[f"algorithm: {algorithm!r}, signed with HS256"] = f"Bearer {_signed(head, payload)}"
        found[f"algorithm: {algorithm!r}, not signed"] = f"Bearer {head}.{payload}."
    for algorithm, digest in {"HS512": hashlib.sha512, "HS384": hashlib.sha384}.items():
        head = _b64(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
        found[f"algorithm: {algorithm}, signed with it"] = f"Bearer {_signed(head, payload, digest)}"
    for name, raw in {
        "no algorithm": b"{}",
        "algorithm is null": b'{"alg":null}',
        "algorithm is a list": b'{"alg":["HS256"]}',
        "algorithm is an object": b'{"alg":{}}',
        "an extension nobody knows": b'{"alg":"HS256","crit":["x"],"x":1}',
        "a detached payload": b'{"alg":"HS256","b64":false,"crit":["b64"]}',
        "a list": b"[]",
        "not JSON": b"HS256",
        "not UTF-8": b"\xff",
        "deep": b'{"alg":"HS256","x":' + b"[" * NESTING,
    }.items():
        found[f"head: {name}"] = f"Bearer {_signed(_b64(raw), payload)}"
    bare = {
        "none": None,
        "empty": "",
        "no scheme": good,
        "no token": "Bearer",
        "a blank behind it": f"Bearer {good} x",
        "basic": "Basic YW5uOmFubg==",
        "another scheme": f"Token {good}",
        "two schemes": f"Bearer Bearer {good}",
        "more behind it": f"Bearer {good} {good}",
        "a comma behind it": f"Bearer {good},",
        "not a token": "Bearer ann",
        "dots": "Bearer ..",
        "two parts": f"Bearer {header}.{payload}",
        "four parts": f"Bearer {good}.{signature}",
        "long": "Bearer " + "a" * 30_000,
        "many dots": "Bearer " + "." * 30_000,
        "beyond ASCII": f"Bearer {good}".encode() + b"\xe9",
        "forged with another secret": f"Bearer {_signed(header, payload, secret=OTHER_SECRET)}",
        "another's signature": f"Bearer {header}.{_b64(json.dumps({**claims, 'sub': 'eve'}).encode())}.{signature}",
        "scope added": f"Bearer {header}.{_b64(json.dumps({**claims, 'scope': STOCK}).encode())}.{signature}",
        "signature cut off": f"Bearer {good[:-1]}",
        "signature empty": f"Bearer {header}.{payload}.",
        "signature of zeros": f"Bearer {header}.{payload}.{_b64(bytes(32))}",
        "signature twice": f"Bearer {good}{signature}",
        "one bit of the signature": f"Bearer {header}.{payload}.{_b64(_flipped(signature))}",
    }
    return bare | found


BAD_KEYS: dict[str, str | bytes | None] = {
    "missing": None,
    "empty": "",
    "too long": "k" * 129,
    "far too long": "k" * 20_000,
    "blank inside": "a b",
    "tab inside": "a\tb",
    "latin-1": b"caf\xe9",
    "UTF-8": "schlüssel".encode(),
    "not UTF-8": b"\xff\xfe",
    "C1": b"a\x9b31m",
}

BAD_IDS = (
    *("0", "-1", "+1", "00", "01", "1.0", "1e3", "0x10", "1_000", "abc", "null", "undefined", "NaN", "*", "~"),
    *("{id}", str(2**63 - 1), str(2**63), str(2**64), str(10**18), str(10**19), str(10**40), "9" * 5_000),
    *("-9223372036854775808", "%31%00", "%00", "1%00", "1%0A", "1%0D%0A", "%201", "1%20", "%09", "%7F", "%ff"),
    *("%ED%A0%80", "%c0%ae", "%zz", "%", "%D9%A1%D9%A2", "%EF%BC%91", "%C2%B2", "%F0%9D%9F%8F", "..%2f1", "%2e%2e"),
    *("%2e%2e%2f1", "1%2F2", "'%20OR%20'1'='1", "1;DROP%20TABLE%20order_order", "1--", "1%27", "%22", "<script>"),
    *("$%7Bjndi:x%7D", "1?x=1", "1%3Fx"),
)
BAD_SKUS = (
    *("%00", "SKU-1%00", "SKU-1%0A", "%0ASKU-1", "SKU-1%0D%0A", "%20", "SKU%201", "%20SKU-1", "%09", "%7F", "%ff"),
    *("%ED%A0%80", "%C3%A9", "%EF%BC%A1", "%D9%A1", "-a", ".a", "_a", "..%2fSKU-1", "%2e%2e", "SKU%2F1", "SKU-1/x"),
    *("x" * 65, "x" * 10_000, "SKU-1%27--", "%22", "<script>", "SKU-1;", "SKU-1%3Fx", "%F0%9F%8E%AB", "%zz", "%"),
    *("*", "a,b", "a@b"),
)


def documents(good: Mapping[str, Any]) -> Iterator[Bad]:
    """What is no good document at all, whatever the fields of a good one."""
    whole = json.dumps(good).encode()
    many = b"".join(b'"field-%d":%d,' % (number, number) for number in range(3_000))
    for name, content in {
        "empty": b"",
        "blank": b" \r\n\t",
        "a word": b"hello",
        "a form": b"sku=SKU-1&quantity=1",
        "XML": b"<order/>",
        "NUL": b"\0",
        "null": b"null",
        "true": b"true",
        "a number": b"1",
        "a string": b'"SKU-1"',
        "an empty list": b"[]",
        "an empty object": b"{}",
        "NaN": b"NaN",
        "the object in a list": b"[" + whole + b"]",
        "the object in a string": json.dumps(whole.decode()).encode(),
        "cut off": whole[:-1],
        "cut in half": whole[: len(whole) // 2],
        "twice": whole + whole,
        "with a word behind": whole + b" x",
        "with NUL behind": whole + b"\0",
        "with a comma behind": whole[:-1] + b",}",
        "with a comment": b"/* hi */" + whole,
        "in single quotes": whole.replace(b'"', b"'"),
        "with a byte order mark": b"\xef\xbb\xbf" + whole,
        "in UTF-16": whole.decode().encode("utf-16"),
        "in UTF-32": whole.decode().encode("utf-32"),
        "not UTF-8": whole[:-1] + b',"x":"\xff"}',
        "not UTF-8 in a name": b'{"\xff":1,' + whole[1:],
        "not UTF-8 at all": bytes(range(128, 256)),
        "a lone surrogate in a name": rb'{"\ud800":1,' + whole[1:],
        "compressed": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        "deep lists": b"[" * NESTING + b"]" * NESTING,
        "deep lists without an end": b"[" * NESTING,
        "deep objects": b'{"a":' * NESTING + b"1" + b"}" * NESTING,
        "deep in an unknown field": whole[:-1] + b',"x":' + b"[" * NESTING + b"]" * NESTING + b"}",
        "deep in a known field": _with(good, (next(iter(good)),), b"[" * NESTING + b"]" * NESTING),
        "many unknown fields": b"{" + many[:60_000].rpartition(b",")[0] + b"}",
        "an unknown field": whole[:-1] + b',"unknown":null}',
        "an empty name": whole[:-1] + b',"":1}',
        "a field in other letters": whole.replace(b'"s', b'"S').replace(b'"t', b'"T').replace(b'"l', b'"L'),
        "the prototype": whole[:-1] + b',"__proto__":{"admin":true}}',
    }.items():
        yield Bad(name, content)
    for name, content in {
        "one byte too large": whole + b" " * (BODY_BYTES_MAX + 1 - len(whole)),
        "far too large": b'{"x":"' + b"x" * 1_000_000 + b'"}',
        "too large and not JSON": b"x" * (BODY_BYTES_MAX + 1),
    }.items():
        yield Bad(name, content, 413, "body_too_large")


def _strings(good: Mapping[str, Any], at: Sequence[Step]) -> Iterator[Bad]:
    where = "/".join(map(str, at))
    for raw in NOT_A_STRING:
        yield Bad(f"{where} is {raw}", _with(good, at, raw.encode()))
    for value in (*LONE_SURROGATES, *NOT_UTF8):
        yield Bad(f"{where} is {value!r}", _with(good, at, value))
    for value_of in CONTROLS:
        yield _text(good, at, _lengthened(good, at, value_of))


def _lengthened(good: Mapping[str, Any], at: Sequence[Step], value: str) -> str:
    # The good value with the control characters, so that nothing else is wrong with it.
    target: Any = good
    for step in at:
        target = target[step]
    return value.replace("a", str(target)) if "a" in value else value


def _text(good: Mapping[str, Any], at: Sequence[Step], value: str) -> Bad:
    return Bad(f"{'/'.join(map(str, at))} is {ascii(value)[:40]}", _with(good, at, json.dumps(value).encode()))


def _with(good: Mapping[str, Any], at: Sequence[Step], raw: bytes) -> bytes:
    """The good body with raw text in place of one value."""
    body = copy.deepcopy(dict(good))
    target: Any = body
    for step in at[:-1]:
        target = target[step]
    target[at[-1]] = "@here@"
    return json.dumps(body).encode().replace(b'"@here@"', raw)


def _without(good: Mapping[str, Any], at: Sequence[Step]) -> dict[str, Any]:
    body = copy.deepcopy(dict(good))
    target: Any = body
    for step in at[:-1]:
        target = target[step]
    del target[at[-1]]
    return body


def _fields(value: Any, at: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Where values stand, depth first."""
    steps: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*at, step)
        yield from _fields(inner, (*at, step))


def _objects(value: Any, at: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    if isinstance(value, dict):
        yield at
    steps: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from _objects(inner, (*at, step))


def _fits(good: Mapping[str, Any], at: Sequence[Step], raw: str) -> bool:
    """Whether a value may well stand there."""
    target: Any = good
    for step in at:
        target = target[step]
    value = json.loads(raw)
    return type(value) is type(target) and not isinstance(value, list)


def _column_names() -> set[str]:
    snake = {column.name for table in TABLES for column in table.columns}
    camel = {name.split("_")[0] + "".join(part.title() for part in name.split("_")[1:]) for name in snake}
    return snake | camel | {"isAdmin", "role", "scope", "sub", "total", "price", "_id", "createdAt", "payBy", "payment"}


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _signed(header: str, payload: str, digest: Any = hashlib.sha256, secret: str = TOKEN_SECRET) -> str:
    mac = hmac.new(secret.encode(), f"{header}.{payload}".encode(), digest).digest()
    return f"{header}.{payload}.{_b64(mac)}"


def _jwt(claims: Mapping[str, Any]) -> str:
    """A token with the shop's own signature over claims that no library would sign."""
    return _signed(_b64(b'{"alg":"HS256","typ":"JWT"}'), _b64(json.dumps(dict(claims)).encode()))


def _flipped(signature: str) -> bytes:
    raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
    raw[0] ^= 1
    return bytes(raw)
