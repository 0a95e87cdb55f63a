"""Notices and pay links: what is forged, old, damaged or not about this money moves nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import pytest
import pytest_asyncio
from hypothesis import assume, given
from hypothesis import strategies as st

from holdfast.clock import US_PER_S
from holdfast.services.payments.sandbox import SIGNATURE_HEADER
from tests.edge import bad
from tests.edge.bad import NOTICE, fuzz
from tests.edge.counter import SANDBOX_SECRET, Counter, State, pay_token, refused, signed, view_of
from tests.shop import PRICE_MINOR, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE_S = 300


class Paid(NamedTuple):
    """An order that was paid at the sandbox; its notice was not delivered."""

    counter: Counter
    location: str
    payment_id: str
    token: str
    raw: bytes

    def signature(self) -> str:
        return signed(self.raw, self.counter.now_s)

    def notice(self, **changed: Any) -> bytes:
        """The notice with other facts in it."""
        return json.dumps({**json.loads(self.raw), **changed}).encode()


async def paid_at(counter: Counter, key: str) -> Paid:
    placed = view_of(await counter.place("payer", key=key))
    assert placed.payment.pay_url is not None
    notice = (await counter.ask("POST", placed.payment.pay_url)).json()
    token = placed.payment.pay_url.rpartition("/")[2]
    return Paid(counter, f"/v1/orders/{placed.id}", placed.payment.id, token, notice["body"].encode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def paid(shared: Counter) -> AsyncIterator[Paid]:
    yield await paid_at(shared, "paid")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def paid_on_sqlite(shared_on_sqlite: Counter) -> AsyncIterator[Paid]:
    yield await paid_at(shared_on_sqlite, "paid")


async def status(paid: Paid) -> str:
    answer = await paid.counter.ask("GET", paid.location, paid.counter.bearer("payer"))
    return str(answer.json()["status"])


# --- Signatures -------------------------------------------------------------------------------------------------------


def mac_of(content: bytes, digest: Any = hashlib.sha256, secret: bytes = SANDBOX_SECRET.encode()) -> str:
    return hmac.new(secret, content, digest).hexdigest()


def forgeries(raw: bytes, token: str, now_s: int) -> dict[str, tuple[bytes, str | bytes | None]]:
    """Notices as (raw body, signature) that the provider never sent like this, made from one that it did send."""
    good = signed(raw, now_s)
    t, v1 = good.split(",")
    digits = v1.removeprefix("v1=")
    signatures: dict[str, str | bytes | None] = {
        "none": None,
        "empty": "",
        "a word": "hello",
        "only the time": t,
        "only the signature": v1,
        "the other way round": f"{v1},{t}",
        "one digit short": good[:-1],
        "one digit more": good + "0",
        "in capitals": f"{t},v1={digits.upper()}",
        "a blank between": f"{t}, {v1}",
        "a third part": f"{good},v2=0",
        "twice": f"{good},{good}",
        "two signatures, the last good": f"{t},v1={'0' * 64},{v1}",
        "another version": f"{t},v2={digits}",
        "in quotes": f'"{good}"',
        "all zeros": f"{t},v1={'0' * 64}",
        "no digits": f"{t},v1={'x' * 64}",
        "wide digits": f"{t},v1=".encode() + "\uff10".encode() * 64,
        "beyond ASCII": good.encode()[:-1] + b"\xe9",
        "a negative time": signed(raw, f"-{now_s}"),
        "a time with a sign": signed(raw, f"+{now_s}"),
        "a time with a point": signed(raw, f"{now_s}.0"),
        "a time in milliseconds": signed(raw, now_s * 1_000),
        "a time in hexadecimal": signed(raw, hex(now_s)),
        "no time at all": signed(raw, ""),
        "arabic digits": b"t=" + "\u0661".encode() * 10 + f",{v1}".encode(),
        "another time than the signed one": f"t={now_s - 1},{v1}",
        "another secret": signed(raw, now_s, "another-secret-of-somebody"),
        "an empty secret": signed(raw, now_s, ""),
        "the secret in other letters": signed(raw, now_s, SANDBOX_SECRET.upper()),
        "over the body alone": f"{t},v1={mac_of(raw)}",
        "over the body and the time": f"{t},v1={mac_of(raw + f'.{now_s}'.encode())}",
        "over nothing": f"{t},v1={mac_of(f'{now_s}.'.encode())}",
        "as pay links are signed": f"{t},v1={mac_of(b'link.' + raw)}",
        "with SHA-1": f"{t},v1={mac_of(f'{now_s}.'.encode() + raw, hashlib.sha1)}",
        "with SHA-512": f"{t},v1={mac_of(f'{now_s}.'.encode() + raw, hashlib.sha512)[:64]}",
        "with no key": f"{t},v1={hashlib.sha256(f'{now_s}.'.encode() + raw).hexdigest()}",
        "a pay link's": f"{t},v1={token.rpartition('.')[2]}",
        "too old": signed(raw, now_s - TOLERANCE_S - 1),
        "an hour old": signed(raw, now_s - 3_600),
        "90 days old": signed(raw, now_s - 90 * 86_400),
        "from 1970": signed(raw, 0),
        "of tomorrow": signed(raw, now_s + 86_400),
        "from the future": signed(raw, now_s + TOLERANCE_S + 5),
        "from the far future": signed(raw, 10**12 - 1),
    }
    told = json.loads(raw)
    bodies = {
        "empty": b"",
        "a blank behind": raw + b" ",
        "a blank in front": b" " + raw,
        "NUL behind": raw + b"\0",
        "cut off": raw[:-1],
        "twice": raw + raw,
        "written differently": json.dumps(told, indent=1).encode(),
        "in another order": json.dumps(dict(sorted(told.items()))).encode(),
        "another amount": json.dumps({**told, "amountMinor": 1}).encode(),
        "another payment": json.dumps({**told, "paymentId": "1"}).encode(),
        "another event": json.dumps({**told, "eventId": "evt-of-mine"}).encode(),
        "a byte order mark": b"\xef\xbb\xbf" + raw,
    }
    return {f"signature: {name}": (raw, signature) for name, signature in signatures.items()} | {
        f"body: {name}": (body, good) for name, body in bodies.items()
    }


@pytest.mark.parametrize("name", forgeries(json.dumps(NOTICE).encode(), "link.mac", 0))
async def test_a_forged_or_old_notice_is_refused(paid_on_sqlite: Paid, name: str) -> None:
    paid = paid_on_sqlite
    raw, signature = forgeries(paid.raw, paid.token, paid.counter.now_s)[name]
    async with paid.counter.unchanged():
        refused(await paid.counter.notify(raw, signature), 400, "forged_notice")


def flips(content: bytes) -> Iterator[bytes]:
    """The content with one bit of one byte flipped, for every bit of every byte."""
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            yield bytes(flipped)


async def test_no_bit_of_a_notice_can_be_flipped(paid_on_sqlite: Paid) -> None:
    paid, counter = paid_on_sqlite, paid_on_sqlite.counter
    tried = 0
    async with counter.unchanged():
        signature = paid.signature()
        for raw in flips(paid.raw):
            refused(await counter.notify(raw, signature), 400, "forged_notice")
            tried += 1
    assert tried == 8 * len(paid.raw)


async def test_no_bit_of_a_signature_can_be_flipped(paid_on_sqlite: Paid) -> None:
    paid, counter = paid_on_sqlite, paid_on_sqlite.counter
    async with counter.unchanged():
        for signature in flips(paid.signature().encode()):
            # On the wire itself: a client refuses to send some of these.
            answer = await counter.raw(
                b"POST /v1/notices/sandbox HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n"
                + f"{SIGNATURE_HEADER}: ".encode()
                + signature
                + f"\r\nContent-Length: {len(paid.raw)}\r\n\r\n".encode()
                + paid.raw
            )
            assert answer.split(b"\r\n", 1)[0] == b"HTTP/1.1 400 Bad Request", signature


@fuzz(300)
@given(
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 5), st.binary(max_size=5)), min_size=1, max_size=5),
    late_s=st.integers(-TOLERANCE_S + 30, TOLERANCE_S - 30),
)
async def test_no_notice_can_be_damaged_in_any_way(
    paid_on_sqlite: Paid, damage: list[tuple[int, int, bytes]], late_s: int
) -> None:
    paid = paid_on_sqlite
    raw = bytearray(paid.raw)
    for at, gone, come in damage:
        start = at % (len(raw) + 1)
        raw[start : start + gone] = come
    assume(bytes(raw) != paid.raw)
    signature = signed(paid.raw, paid.counter.now_s + late_s)
    refused(await paid.counter.notify(bytes(raw), signature), 400, "forged_notice")
    assert await status(paid) == "pending_payment"


# --- Facts ------------------------------------------------------------------------------------------------------------


def malformed() -> Iterator[bad.Bad]:
    """Notices that the provider signed although they make no sense."""
    yield from bad.documents(NOTICE)
    for name in NOTICE:
        rest = {key: value for key, value in NOTICE.items() if key != name}
        yield bad.Bad(f"without {name}", json.dumps(rest).encode())
    odd: dict[str, tuple[Any, ...]] = {
        "eventId": (1, None, [], "", " ", "a b", "a\n", "a\0", "\x1b[31m", "é", "e" * 129),
        "merchantId": (1, None, [], {}),
        "paymentId": (
            *(1, None, [], "", " ", "-1", "+1", "1.0", "1e3", "0x1", "a", " 1", "1 ", "1\n", "1\0", "1_0"),
            *("\u0661", "\uff11", "\xb2", "1" * 20, str(2**63), str(10**40)),
        ),
        "tradeNo": (1, None, [], "", "a b", "t\n", "t\0", "t" * 129),
        "amountMinor": ("1000", None, True, [], -1, 1.5, 1_000.0, 10**12 + 1, 2**63, 10**30),
        "currency": (1, None, "", "cny", "CN", "CNYX", "CNY\n", " CNY", "\uff23\uff2e\uff39"),
        "paidAt": (
            *(
                1,
                1.5,
                None,
                [],
                "",
                "yesterday",
                "2026-01-31",
                "08:30:00Z",
                "2026-01-31T08:30:00",
                "2026-02-30T00:00:00Z",
            ),
            *("2026-01-31T25:00:00Z", "10000-01-01T00:00:00Z", "-0001-01-01T00:00:00Z", "2026-01-31T08:30:00+99:00"),
        ),
    }
    for name, values in odd.items():
        for value in values:
            yield bad.Bad(f"{name} is {ascii(value)[:40]}", json.dumps({**NOTICE, name: value}).encode())
    for raw in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5_000, rb'"\ud800"', b'"\xff"', b"[" * bad.NESTING):
        for name in ("amountMinor", "merchantId", "paidAt"):
            content = json.dumps({**NOTICE, name: "@here@"}).encode().replace(b'"@here@"', raw)
            yield bad.Bad(f"{name} is {raw[:20]!r}", content)
    for name in ("status", "orderId", "order_id", "buyer", "verdict", "capturedMinor", "refundedMinor", "price_minor"):
        yield bad.Bad(f"with {name}", json.dumps({**NOTICE, name: 1}).encode())


@pytest.mark.parametrize("notice", [pytest.param(each, id=each.name) for each in malformed()])
async def test_a_malformed_notice_is_refused_although_it_is_signed(shared_on_sqlite: Counter, notice: bad.Bad) -> None:
    counter = shared_on_sqlite
    async with counter.unchanged():
        answer = await counter.notify(notice.content, signed(notice.content, counter.now_s))
        refused(answer, notice.status, "forged_notice" if notice.status == 400 else notice.code)


async def test_no_malformed_notice_reaches_any_database(shared: Counter) -> None:
    async with shared.unchanged():
        for notice in malformed():
            answer = await shared.notify(notice.content, signed(notice.content, shared.now_s))
            assert answer.status_code == notice.status, f"{notice.name}: {answer.text}"


WRONG_FACTS: dict[str, dict[str, Any]] = {
    "another merchant": {"merchantId": "another-shop"},
    "no merchant": {"merchantId": ""},
    "the merchant in other letters": {"merchantId": "Holdfast-Demo"},
    "less money": {"amountMinor": PRICE_MINOR - 1},
    "more money": {"amountMinor": PRICE_MINOR + 1},
    "no money": {"amountMinor": 0},
    "all the money": {"amountMinor": 10**12},
    "another currency": {"currency": "USD"},
    "a currency nobody knows": {"currency": "ZZZ"},
    "an unknown payment": {"paymentId": "77"},
    "payment zero": {"paymentId": "0"},
    "a payment far away": {"paymentId": "8" * 19},
}


def came(before: State, after: State) -> list[str]:
    """The tables of the rows that came, after checking that none went."""
    assert set(before) <= set(after)
    return [table for table, _ in sorted(set(after) - set(before))]


@pytest.mark.parametrize("changed", WRONG_FACTS.values(), ids=WRONG_FACTS)
async def test_a_notice_of_wrong_facts_is_kept_and_moves_nothing(paid: Paid, changed: dict[str, Any]) -> None:
    counter = paid.counter
    event_id = "evt-" + "-".join(f"{name}.{value}" for name, value in changed.items())
    raw = paid.notice(eventId=event_id, **changed)
    before = await counter.state()
    for _ in range(2):
        answer = await counter.notify(raw, signed(raw, counter.now_s))
        assert (answer.status_code, answer.text) == (200, "success")  # it is stored; sending it again helps nobody
    assert came(before, await counter.state()) == ["payment_notice"]
    kept = await rows(
        counter.system, "SELECT verdict FROM payment_notice WHERE event_id = :event_id", event_id=event_id
    )
    assert kept == [{"verdict": "unknown_payment" if "paymentId" in changed else "wrong_facts"}]
    assert await status(paid) == "pending_payment"


@pytest.mark.parametrize("age_s", [-TOLERANCE_S + 30, 0, TOLERANCE_S - 30])
async def test_a_genuine_notice_counts_within_its_tolerance_and_once(shared: Counter, age_s: int) -> None:
    paid = await paid_at(shared, f"age-{age_s}")
    before = await shared.state()
    for sent_s in (shared.now_s - age_s, shared.now_s):
        answer = await shared.notify(paid.raw, signed(paid.raw, sent_s))
        assert (answer.status_code, answer.text) == (200, "success")
    after = await shared.state()
    counted = sorted(table for table, _ in set(after) - set(before))
    assert counted == ["hf_message", "hf_message", "payment_notice", "payment_order"]  # for orders, and for the feed


PROVIDERS = (
    "other",
    "Sandbox",
    "SANDBOX",
    "sandbox%20",
    "sandbox%00",
    "sandbox;x",
    "sandbox%2F",
    "alipay",
    "%73andbo",
    "*",
)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_genuine_notice_under_another_providers_name_is_refused(paid: Paid, provider: str) -> None:
    counter = paid.counter
    async with counter.unchanged():
        headers = {SIGNATURE_HEADER: paid.signature()}
        answer = await counter.ask("POST", f"/v1/notices/{provider}", headers, content=paid.raw)
        assert answer.json()["code"] in {"not_found", "unknown_provider"}
        refused(answer, 404, answer.json()["code"])


# --- Pay links --------------------------------------------------------------------------------------------------------


class Unpaid(NamedTuple):
    """An order and the link that pays it."""

    counter: Counter
    token: str

    @property
    def link(self) -> dict[str, Any]:
        body = self.token.partition(".")[0]
        told: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return told

    async def pay(self, token: str | bytes) -> Any:
        raw = token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")
        return await self.counter.ask("POST", "/sandbox/pay/" + quote_from_bytes(raw, safe="").replace(".", "%2E"))


async def unpaid_at(counter: Counter, key: str) -> Unpaid:
    placed = view_of(await counter.place("payer", key=key))
    assert placed.payment.pay_url is not None
    return Unpaid(counter, placed.payment.pay_url.rpartition("/")[2])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unpaid(shared: Counter) -> AsyncIterator[Unpaid]:
    yield await unpaid_at(shared, "unpaid")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unpaid_on_sqlite(shared_on_sqlite: Counter) -> AsyncIterator[Unpaid]:
    yield await unpaid_at(shared_on_sqlite, "unpaid")


async def test_the_test_can_make_links(unpaid: Unpaid) -> None:
    assert pay_token(unpaid.link).count(".") == unpaid.token.count(".") == 1
    body = unpaid.token.partition(".")[0]
    assert unpaid.token == f"{body}.{mac_of(b'link.' + body.encode())}"


async def test_a_forged_or_cut_off_link_pays_nothing(unpaid: Unpaid) -> None:
    body, _, mac = unpaid.token.partition(".")
    cheap = base64.urlsafe_b64encode(json.dumps({**unpaid.link, "amountMinor": 1}).encode()).rstrip(b"=").decode()
    unsigned = base64.urlsafe_b64encode(b"{}").decode()
    forged = [
        *(unpaid.token[:length] for length in (1, 5, len(body), len(body) + 1, len(unpaid.token) - 1)),
        *(
            f"{body}.",
            f".{mac}",
            ".",
            "..",
            "a",
            "a.b",
            f"{body}{mac}",
            f"{body}..{mac}",
            f"{unpaid.token}.",
            f".{unpaid.token}",
        ),
        *(
            f"{unpaid.token} ",
            f" {unpaid.token}",
            f"{unpaid.token}\n",
            f"{unpaid.token}\0",
            f"{unpaid.token}=",
            f"{body}=.{mac}",
        ),
        *(
            f"{body}==.{mac}",
            f"{body}.{mac.upper()}",
            f"{body.swapcase()}.{mac}",
            f"{body}.{mac[::-1]}",
            f"{body}.{'0' * 64}",
        ),
        *(
            f"{body}.{mac_of(body.encode())}",
            f"{body}.{mac_of(b'link.' + body.encode(), secret=b'')}",
            f"{cheap}.{mac}",
        ),
        *(
            f"{body}+.{mac}",
            f"{body},{mac}",
            f"{body}:{mac}",
            f"{unsigned}.{mac}",
            "x" * 20_000,
            "." * 10_000,
            "é.é",
            "\ud800.a",
        ),
        *(
            f"{body}.{mac}é",
            body + "." + "\uff10" * 64,
            pay_token(unpaid.link, "another-secret"),
            pay_token(unpaid.link, ""),
        ),
        f"{body}.{signed(body.encode(), unpaid.counter.now_s).rpartition('=')[2]}",
    ]
    async with unpaid.counter.unchanged():
        for token in forged:
            refused(await unpaid.pay(token), 400, "invalid_input")


async def test_no_byte_of_a_link_can_be_changed(unpaid_on_sqlite: Unpaid) -> None:
    unpaid = unpaid_on_sqlite
    async with unpaid.counter.unchanged():
        for token in itertools.islice(flips(unpaid.token.encode()), 0, None, 3):  # each byte two or three times
            answer = await unpaid.pay(token)
            status, code = (404, "not_found") if b"/" in token else (400, "invalid_input")
            refused(answer, status, code)


@pytest.mark.parametrize(
    "changed",
    [{"payByUs": "soon"}, {"version": 2}, {"amountMinor": None}, {"paymentId": "1"}, {"paymentId": 10**30}],
    ids=["wrong type", "another version", "no amount", "an id as text", "a huge id"],
)
async def test_a_link_that_is_signed_and_makes_no_sense_pays_nothing(unpaid: Unpaid, changed: dict[str, Any]) -> None:
    async with unpaid.counter.unchanged():
        refused(await unpaid.pay(pay_token({**unpaid.link, **changed})), 400, "invalid_input")


async def test_an_expired_link_pays_nothing(unpaid: Unpaid) -> None:
    counter = unpaid.counter
    now_us = counter.now_s * US_PER_S
    async with counter.unchanged():
        for pay_by_us in (now_us - 1, now_us - 86_400 * US_PER_S, 0, -1):
            # A payment of its own, for which no trade was ever opened.
            link = {**unpaid.link, "payByUs": pay_by_us}
            refused(await unpaid.pay(pay_token(link)), 409, "trade_closed")


async def test_the_link_of_a_cancelled_order_pays_nothing(shared: Counter) -> None:
    placed = view_of(await shared.place("payer", key="cancelled"))
    cancelled = await shared.ask("POST", f"/v1/orders/{placed.id}/cancel", shared.bearer("payer"))
    assert cancelled.json()["status"] == "cancelled"
    assert placed.payment.pay_url is not None
    async with shared.unchanged():
        refused(await shared.ask("POST", placed.payment.pay_url), 409, "trade_closed")
