"""Webhooks' rules: endpoints, deliveries, when to try again, which URLs and addresses are allowed."""

from __future__ import annotations

import ipaddress
import random
import re
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, UnsetType

from holdfast.clock import US_PER_S, rfc3339
from holdfast.errors import InvalidInput, Refused
from holdfast.services.contracts.feed import FACT_TYPES
from holdfast.settings import Secret
from holdfast.webhooks import sign

SCHEDULE_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Waits after the failed attempts of one round, three days in all; then the delivery has failed."""
JITTER = 0.1
RETRY_AFTER_S_MAX = 86_400
GONE = 410
ANSWER_BYTES_MAX = 1_000

PENDING, DONE, FAILED, CANCELLED = "pending", "done", "failed", "cancelled"
STATUSES = (PENDING, DONE, FAILED, CANCELLED)

Description = Annotated[str, Meta(max_length=200)]
WebhookUrl = Annotated[str, Meta(min_length=1, max_length=2_000)]
EventTypes = Annotated[tuple[str, ...], Meta(max_length=100)]


class WebhookNotFound(Refused):
    """There is no such webhook or delivery."""

    code = "webhook_not_found"


class WebhookExists(Refused):
    """Events are sent to this URL already; change that webhook."""

    code = "webhook_exists"


class TooManyWebhooks(Refused):
    """There are as many webhooks as this server serves; remove one."""

    code = "too_many_webhooks"


class ForbiddenUrl(InvalidInput):
    """Nothing is sent to this URL: it is no https URL, or its host has an address that is not public."""

    code = "forbidden_url"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A URL taken apart, once: what is checked is what is used."""

    scheme: str
    host: str
    port: int
    path: str


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where events are sent."""

    id: int
    url: str
    description: str
    types: tuple[str, ...]  # none: all
    enabled: bool
    disabled_reason: str | None
    secret: Secret
    previous_secret: Secret | None
    previous_until_us: int | None
    failing_since_us: int | None
    flagged_us: int | None
    created_us: int
    changed_us: int

    def wants(self, type_id: str) -> bool:
        """Whether events of this type are for it."""
        return not self.types or type_id in self.types

    def signatures(self, message_id: str, now_us: int, raw: bytes) -> str:
        """Signed with the secret, and with the former one for as long as both count."""
        secrets = [self.secret]
        if self.previous_secret is not None and now_us < (self.previous_until_us or 0):
            secrets.append(self.previous_secret)
        return sign([each.reveal() for each in secrets], message_id, now_us // US_PER_S, raw)


class NewEndpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wish for an endpoint."""

    url: WebhookUrl
    description: Description = ""
    types: EventTypes = ()


class EndpointChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be different about an endpoint; what is left out stays."""

    url: WebhookUrl | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    types: EventTypes | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class EndpointView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An endpoint as staff see it; its secret is not told again."""

    id: str
    url: str
    description: str
    types: tuple[str, ...]
    enabled: bool
    disabled_reason: str | None
    failing_since: str | None
    flagged_at: str | None
    previous_secret_until: str | None
    created_at: str


class EndpointWithSecret(EndpointView, frozen=True, kw_only=True, rename="camel"):
    """An endpoint with its new secret, told this once."""

    secret: str


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One event on its way to one endpoint."""

    id: int
    endpoint_id: int
    event_id: int
    type: str
    body: bytes
    status: str
    attempts: int
    round_start: int  # attempts made before the schedule last began
    due_us: int

    @property
    def message_id(self) -> str:
        """What the receiver knows the event by; the same at every attempt."""
        return f"evt_{self.event_id}"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one attempt: a status, or the reason why there is none."""

    status: int | None = None
    error: str | None = None
    text: str = ""
    retry_after_s: int | None = None
    took_ms: int = 0

    @property
    def accepted(self) -> bool:
        """Whether the receiver took the event."""
        return self.status is not None and 200 <= self.status < 300


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery that was tried, and what became of it."""

    delivery: Delivery
    at_us: int
    answer: Answer


class AttemptView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An attempt as staff see it."""

    attempt: int
    at: str
    status: int | None
    error: str | None
    answer: str
    took_ms: int


class DeliveryView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A delivery as staff see it."""

    id: str
    webhook: str
    event: str
    type: str
    status: str
    attempts: int
    next_at: str | None
    last_status: int | None
    last_error: str | None
    created_at: str


class DeliveryLog(DeliveryView, frozen=True, kw_only=True, rename="camel"):
    """A delivery with its attempts and the body that is sent."""

    body: dict[str, Any]
    log: list[AttemptView]


def next_try_us(attempt: Attempt, chance: random.Random) -> int | None:
    """When to try again after an attempt that was not accepted; None for never."""
    done = attempt.delivery.attempts - attempt.delivery.round_start
    if attempt.answer.status == GONE or done > len(SCHEDULE_S):
        return None
    wait_s = SCHEDULE_S[done - 1] * (1 + JITTER * chance.random())
    asked_s = min(attempt.answer.retry_after_s or 0, RETRY_AFTER_S_MAX)
    return attempt.at_us + round(max(wait_s, asked_s) * US_PER_S)


def view(endpoint: Endpoint) -> EndpointView:
    """An endpoint without its secrets."""
    return EndpointView(**_shown(endpoint))


def view_with_secret(endpoint: Endpoint) -> EndpointWithSecret:
    """An endpoint with its secret, for the one answer that tells it."""
    return EndpointWithSecret(**_shown(endpoint), secret=endpoint.secret.reveal())


def check_event_types(types: Sequence[str]) -> None:
    """Raise `InvalidInput` for a type that no event has."""
    if unknown := [each for each in types if each not in FACT_TYPES]:
        raise InvalidInput(f"there are no events of type {unknown[0][:80]!r}; there are: {', '.join(FACT_TYPES)}")


def target_of(url: str, *, allow_http: bool) -> Target:
    """Take a URL apart; raises `ForbiddenUrl` for one that is odd, holds a password or is not https."""
    if not re.fullmatch(r"[\x21-\x7e]{1,2000}", url) or "\\" in url:
        raise ForbiddenUrl("a webhook's URL is up to 2,000 visible ASCII characters, with no \\ among them")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ForbiddenUrl("this is no URL; write it as https://example.com/hooks") from None
    if parts.scheme not in ("https", "http") or (parts.scheme == "http" and not allow_http):
        raise ForbiddenUrl("a webhook's URL begins with https://")
    if "@" in parts.netloc or parts.fragment:
        raise ForbiddenUrl("a webhook's URL holds no user, password or fragment")
    if not _is_host(host) or port == 0 or ("[" in parts.netloc) != (":" in host):
        raise ForbiddenUrl("a webhook's URL needs a host, and a port from 1 to 65535 if any")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(scheme=parts.scheme, host=host, port=port or (443 if parts.scheme == "https" else 80), path=path)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: in a block that is, and in none set apart within it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in each for each in _V4_APART)
    if ip in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip in _V6_PUBLIC and not any(ip in each for each in _V6_APART)


# Written out, since what `ipaddress` takes for global differs between versions of Python.
_V4_APART = [
    ipaddress.IPv4Network(each)
    for each in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's metadata; those of others are in the blocks above
    )
]
_V6_PUBLIC = ipaddress.IPv6Network("2000::/3")
_V6_APART = [  # protocol assignments with Teredo, examples, 6to4
    ipaddress.IPv6Network(each) for each in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address as a network without IPv4 sees it


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            return ipaddress.ip_address(host).version == 6 and "%" not in host
        except ValueError:
            return False
    return bool(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9.])?", host)) and ".." not in host


def _shown(endpoint: Endpoint) -> dict[str, Any]:
    overlap = endpoint.previous_until_us if endpoint.previous_secret is not None else None
    return {
        "id": str(endpoint.id),
        "url": endpoint.url,
        "description": endpoint.description,
        "types": endpoint.types,
        "enabled": endpoint.enabled,
        "disabled_reason": endpoint.disabled_reason,
        "failing_since": _time(endpoint.failing_since_us),
        "flagged_at": _time(endpoint.flagged_us),
        "previous_secret_until": _time(overlap),
        "created_at": rfc3339(endpoint.created_us),
    }


def _time(at_us: int | None) -> str | None:
    return None if at_us is None else rfc3339(at_us)
