"""Signatures of webhooks, against the official library, and the URLs and addresses that nothing is sent to."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
import subprocess
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpcore
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from holdfast.clock import US_PER_S, ManualClock, SystemClock
from holdfast.errors import InvalidInput
from holdfast.services.webhooks.addresses import SafeResolver
from holdfast.services.webhooks.model import (
    SCHEDULE_S,
    Answer,
    Attempt,
    Delivery,
    ForbiddenUrl,
    is_public,
    next_try_us,
    target_of,
)
from holdfast.services.webhooks.wire import HttpWire, PinnedBackend
from holdfast.webhooks import ForgedWebhook, new_secret, sign, verify
from tests.conftest import eventually
from tests.receiver import receiving

BODY = '{"type":"order.paid","timestamp":"2026-01-31T08:30:00Z","data":{"note":"naïve ✓"}}'.encode()
SPEC_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PUBLIC, ANOTHER = "93.184.216.34", "1.1.1.1"


def signed(secrets: Sequence[str], raw: bytes = BODY, *, at_s: int | None = None) -> dict[str, str]:
    sent_s = SystemClock().now_us() // US_PER_S if at_s is None else at_s
    return {
        "webhook-id": "evt_7",
        "webhook-timestamp": str(sent_s),
        "webhook-signature": sign(secrets, "evt_7", sent_s, raw),
    }


def test_our_signature_is_the_official_one() -> None:
    at_s = 1_674_087_231
    for secret in (new_secret(), SPEC_SECRET):
        theirs = Webhook(secret).sign("evt_7", datetime.fromtimestamp(at_s, UTC), BODY.decode())
        assert sign([secret], "evt_7", at_s, BODY) == theirs
    assert 24 <= len(base64.b64decode(new_secret().removeprefix("whsec_"))) <= 64
    assert len({new_secret() for _ in range(100)}) == 100


def test_each_side_verifies_the_other() -> None:
    old, new = new_secret(), new_secret()
    headers = signed([new, old])
    assert Webhook(new).verify(BODY, headers) == Webhook(old).verify(BODY, headers)
    assert verify([old], headers, BODY) == verify(new, headers, BODY) == "evt_7"
    theirs = headers | {"webhook-signature": Webhook(old).sign("evt_7", datetime.now(UTC), BODY.decode())}
    theirs["webhook-timestamp"] = str(SystemClock().now_us() // US_PER_S)
    theirs["webhook-signature"] = "v1a,AAAA " + sign([old], "evt_7", int(theirs["webhook-timestamp"]), BODY)
    assert verify([new, old], {name.title(): value for name, value in theirs.items()}, BODY) == "evt_7"


@pytest.mark.parametrize(
    "change",
    [
        lambda headers: headers | {"webhook-id": "evt_8"},
        lambda headers: headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)},
        lambda headers: headers | {"webhook-signature": "v1,"},
        lambda headers: headers | {"webhook-signature": headers["webhook-signature"].replace("v1,", "v2,")},
        lambda headers: headers | {"webhook-signature": headers["webhook-signature"][3:]},
        lambda headers: headers | {"webhook-signature": "v1,ÿ \ud800"},
        lambda headers: {name: value for name, value in headers.items() if name != "webhook-id"},
        lambda headers: headers | {"webhook-timestamp": "now"},
        lambda headers: headers | {"webhook-timestamp": "1e9"},
        lambda headers: headers | {"webhook-timestamp": "9" * 5_000},
    ],
)
def test_a_forged_webhook_is_refused(change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    secret = new_secret()
    headers = signed([secret])
    verify(secret, headers, BODY)
    with pytest.raises(ForgedWebhook):
        verify(secret, change(headers), BODY)
    with pytest.raises((WebhookVerificationError, ValueError)):  # the official library agrees
        Webhook(secret).verify(BODY, change(headers))


def test_another_body_or_secret_is_refused() -> None:
    secret = new_secret()
    headers = signed([secret])
    for wrong, raw in ((secret, BODY + b" "), (secret, b""), (new_secret(), BODY)):
        with pytest.raises(ForgedWebhook):
            verify(wrong, headers, raw)
    for odd in ("", "whsec_", "whsec_not base64!"):
        with pytest.raises(InvalidInput):
            verify(odd, headers, BODY)


@pytest.mark.parametrize(("age_s", "good"), [(0, True), (299, True), (301, False), (-299, True), (-301, False)])
def test_an_old_or_early_webhook_is_refused(age_s: int, good: bool) -> None:
    clock, secret = ManualClock(), new_secret()
    headers = signed([secret], at_s=clock.now_us() // US_PER_S - age_s)
    if good:
        verify(secret, headers, BODY, clock=clock)
        return
    with pytest.raises(ForgedWebhook):
        verify(secret, headers, BODY, clock=clock)


# --- When to try again ------------------------------------------------------------------------------------------------


def attempt(number: int, answer: Answer, round_start: int = 0) -> Attempt:
    delivery = Delivery(
        id=1,
        endpoint_id=1,
        event_id=1,
        type="order.paid",
        body=b"",
        status="pending",
        attempts=number,
        round_start=round_start,
        due_us=0,
    )
    return Attempt(delivery=delivery, at_us=0, answer=answer)


def test_the_schedule_lasts_three_days_and_starts_anew_with_a_replay() -> None:
    chance = random.Random(7)
    waits = [next_try_us(attempt(number, Answer(status=500)), chance) for number in range(1, len(SCHEDULE_S) + 1)]
    for wait_us, wanted_s in zip(waits, SCHEDULE_S, strict=True):
        assert wait_us is not None
        assert wanted_s * US_PER_S <= wait_us <= wanted_s * 1.1 * US_PER_S
    assert sum(SCHEDULE_S) > 3 * 86_400
    assert next_try_us(attempt(len(SCHEDULE_S) + 1, Answer(status=500)), chance) is None
    replayed = next_try_us(attempt(11, Answer(error="ConnectError"), round_start=10), chance)
    assert replayed is not None
    assert replayed < 6 * US_PER_S
    assert next_try_us(attempt(1, Answer(status=410)), chance) is None
    assert next_try_us(attempt(1, Answer(status=503, retry_after_s=10**8)), chance) == 86_400 * US_PER_S


# --- Where nothing is sent --------------------------------------------------------------------------------------------

REFUSED_URLS = [
    "http://example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "javascript:alert(1)",
    "//example.com/",
    "example.com",
    "https://",
    "https:///path",
    "https://user@example.com/",
    "https://user:word@example.com/",
    "https://example.com@127.0.0.1/",
    "https://example.com/#fragment",
    "https://example.com\\@127.0.0.1/",
    "https://exa mple.com/",
    "https://example.com/\r\nX: y",
    "https://example.com/\x00",
    "https://exämple.com/",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://example.com:x/",
    "https://[::1/",
    "https://[fe80::1%25eth0]/",
    "https://[v1.x]/",
    "https://exa%6dple.com/",
    "https://a..b/",
    "https://" + "a" * 2_000 + "/",
]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_a_url_that_is_odd_is_refused(url: str) -> None:
    with pytest.raises(ForbiddenUrl):
        target_of(url, allow_http=False)


def test_a_url_is_taken_apart_once() -> None:
    target = target_of("https://hooks.example.com:8443/a/b?c=d&e", allow_http=False)
    assert (target.scheme, target.host, target.port, target.path) == ("https", "hooks.example.com", 8443, "/a/b?c=d&e")
    assert target_of("https://[2606:4700::1111]", allow_http=False).host == "2606:4700::1111"
    plain = target_of("http://example.com?x", allow_http=True)
    assert (plain.port, plain.path) == (80, "/?x")


PRIVATE = [
    "127.0.0.1",
    "127.8.9.10",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "2001:db8::1",
    "3fff::1",
    "4000::1",
    "100::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "not an address",
    "",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, ANOTHER, "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808"]
)
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(address)


class Names:
    """A resolver of names at the socket level: each question takes the next answer, the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

        def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
            self.asked.append(host)
            found = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            return [(10 if ":" in each else 2, 1, 6, "", (each, port)) for each in found]

        monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)


class Connections(httpcore.AsyncNetworkBackend):
    """Takes note of where a connection is wanted, and makes none."""

    def __init__(self) -> None:
        self.wanted: list[str] = []

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        self.wanted.append(host)
        raise httpcore.ConnectError("no connections here")


async def test_the_address_that_was_checked_is_the_one_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the name turns to this machine after the check. It is not asked again."""
    names, connections = Names(monkeypatch, [PUBLIC], ["127.0.0.1"]), Connections()
    backend = PinnedBackend(SafeResolver(allow_private=False), connections)
    with pytest.raises(httpcore.ConnectError):
        await backend.connect_tcp("rebinding.example", 443)
    assert (names.asked, connections.wanted) == (["rebinding.example"], [PUBLIC])
    with pytest.raises(ForbiddenUrl):  # and the next time it is checked anew
        await backend.connect_tcp("rebinding.example", 443)
    assert connections.wanted == [PUBLIC]


@pytest.mark.parametrize("hidden", [[PUBLIC, "127.0.0.1"], ["::1", PUBLIC], [PUBLIC, "::ffff:10.0.0.1"]])
async def test_one_private_address_among_public_ones_refuses_the_name(
    monkeypatch: pytest.MonkeyPatch, hidden: list[str]
) -> None:
    Names(monkeypatch, hidden)
    connections = Connections()
    with pytest.raises(ForbiddenUrl):
        await PinnedBackend(SafeResolver(allow_private=False), connections).connect_tcp("both.example", 443)
    assert connections.wanted == []


async def test_every_address_is_tried_but_none_that_was_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    names, connections = Names(monkeypatch, [PUBLIC, ANOTHER, PUBLIC]), Connections()
    with pytest.raises(httpcore.ConnectError):
        await PinnedBackend(SafeResolver(allow_private=False), connections).connect_tcp("two.example", 443)
    assert connections.wanted == [PUBLIC, ANOTHER]
    assert len(names.asked) == 1


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "localhost", "[::1]", "127.0.0.1"])
async def test_this_machine_is_not_reached_by_another_spelling(host: str) -> None:
    async with receiving() as receiver:
        wire = HttpWire(SafeResolver(allow_private=False), SystemClock(), 2_000)
        try:
            target = target_of(f"http://{host}:{receiver.port}/", allow_http=True)
            answer = await wire.post(target, {}, b"{}")
        finally:
            await wire.close()
    assert answer.status is None
    assert (answer.error or "").startswith(("ForbiddenUrl", "ConnectError"))
    assert receiver.got == []


async def test_a_name_is_resolved_once_for_each_request_and_kept_in_its_host_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with receiving() as receiver:
        names = Names(monkeypatch, ["127.0.0.1"])
        wire = HttpWire(SafeResolver(allow_private=True), SystemClock(), 2_000)
        try:
            target = target_of(receiver.url("/x?y", "hooks.example"), allow_http=True)
            for _ in range(2):
                assert (await wire.post(target, {"a": "b"}, b"{}")).status == 200
        finally:
            await wire.close()
        assert names.asked == ["hooks.example"] * 2
        assert [each.headers["host"] for each in receiver.got] == [f"hooks.example:{receiver.port}"] * 2
        assert [(each.path, each.headers["a"], each.raw) for each in receiver.got] == [("/x?y", "b", b"{}")] * 2


def certified(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for a name, which nobody trusts, and its key."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    named = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    written = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made.split(" "), *named, *written], check=True, capture_output=True)
    return certificate, key


async def test_the_certificate_is_checked_against_the_name_and_not_the_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate, key = certified(tmp_path, "hooks.example")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with receiving(served) as receiver:
        Names(monkeypatch, ["127.0.0.1"])
        answers = []
        for trust, name in ((trusting, "hooks.example"), (trusting, "other.example"), (None, "hooks.example")):
            wire = HttpWire(SafeResolver(allow_private=True), SystemClock(), 5_000, trust=trust)
            try:
                target = target_of(f"https://{name}:{receiver.port}/", allow_http=False)
                answers.append(await wire.post(target, {}, b"{}"))
            finally:
                await wire.close()
    right, wrong_name, not_trusted = answers
    assert (right.status, right.error) == (200, None)
    for refused in (wrong_name, not_trusted):
        assert refused.status is None
        assert "CERTIFICATE_VERIFY_FAILED" in (refused.error or "")
    assert [each.headers["host"] for each in receiver.got] == [f"hooks.example:{receiver.port}"]


async def test_a_name_without_an_answer_keeps_one_thread_busy_and_nobody_else_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, asked = threading.Event(), []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        if host == "hangs.example":
            go_on.wait(20)
        return [(2, 1, 6, "", (PUBLIC, port))]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    resolver = SafeResolver(allow_private=False)
    try:
        waiting = [asyncio.create_task(resolver.addresses("hangs.example", 443)) for _ in range(100)]

        async def hanging() -> bool:
            return asked == ["hangs.example"]

        await eventually(hanging, "the name is asked for")
        assert await resolver.addresses("quick.example", 443) == [PUBLIC]
        assert sorted(asked) == ["hangs.example", "quick.example"]
        go_on.set()
        assert await asyncio.gather(*waiting) == [[PUBLIC]] * 100
    finally:
        go_on.set()
        resolver.close()
