"""The merchant's account at Alipay, read from the settings and checked before anything is sold. Reads key files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from holdfast.errors import InvalidSettings
from holdfast.services.payments.alipay_signing import Keys, read_keys
from holdfast.settings import PaymentsSettings, Secret

PREFIX = "HOLDFAST_PAYMENTS__ALIPAY_"
MS_PER_MINUTE = 60_000
TIME_OUT_MS_MIN = MS_PER_MINUTE  # Alipay takes deadlines of one minute
TIME_OUT_MS_MAX = 15 * 24 * 60 * MS_PER_MINUTE  # to 15 days
URL_LENGTH_MAX = 256
SUBJECT_LENGTH_MAX = 200
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Who sells, by which app and keys, and over which gateway."""

    app_id: str
    seller_id: str
    keys: Keys
    gateway: str
    notify_url: str
    return_url: str
    subject: str
    timeout_ms: int

    @property
    def encrypted(self) -> bool:
        """Whether the gateway is spoken to over TLS; only one on this machine, in tests, is not."""
        return self.gateway.startswith("https:")


def read_account(settings: PaymentsSettings, time_out_ms: int) -> Account:
    """Check what is set and read the keys; raises `InvalidSettings` that says what to do."""
    if not re.fullmatch(r"\d{8,32}", settings.alipay_app_id, re.ASCII):
        raise _wrong("APP_ID", "it must be the digits that the app's page at open.alipay.com shows")
    if not re.fullmatch(r"2088\d{12}", settings.alipay_seller_id, re.ASCII):
        raise _wrong("SELLER_ID", "it must be the 16 digits of the merchant's account, which begin with 2088 (PID)")
    if not TIME_OUT_MS_MIN <= time_out_ms <= TIME_OUT_MS_MAX:
        raise InvalidSettings(
            f"HOLDFAST_ORDERS__TIME_OUT_MS = {time_out_ms}: Alipay takes 1 minute to 15 days to pay "
            f"({TIME_OUT_MS_MIN} to {TIME_OUT_MS_MAX})"
        )
    if re.search(r"[/=&]|[^\x20-\x7e\u0080-\uffff]", settings.alipay_subject) or not settings.alipay_subject.strip():
        raise _wrong("SUBJECT", "it is shown to the buyer before the order's number; leave out / = & and emoji")
    if len(settings.alipay_subject) > SUBJECT_LENGTH_MAX:
        raise _wrong("SUBJECT", f"Alipay shows {SUBJECT_LENGTH_MAX} characters at most")
    private = settings.alipay_private_key.reveal() or _file("PRIVATE_KEY", settings.alipay_private_key_file)
    public = settings.alipay_public_key or _file("PUBLIC_KEY", settings.alipay_public_key_file)
    return Account(
        app_id=settings.alipay_app_id,
        seller_id=settings.alipay_seller_id,
        keys=read_keys(Secret(private), public),
        gateway=_gateway(settings.alipay_gateway),
        notify_url=_url("NOTIFY_URL", settings.alipay_notify_url),
        return_url=_url("RETURN_URL", settings.alipay_return_url) if settings.alipay_return_url else "",
        subject=settings.alipay_subject.strip(),
        timeout_ms=settings.call_timeout_ms,
    )


def _file(name: str, path: str) -> str:
    if not path:
        raise _wrong(name, f"it is missing; set it, or {PREFIX}{name}_FILE to the file that holds it")
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError as error:
        raise _wrong(f"{name}_FILE", f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # the cause could quote a private key
        raise _wrong(f"{name}_FILE", f"{path} holds no PEM and no base64") from None


def _gateway(url: str) -> str:
    if _host("GATEWAY", url) not in LOOPBACK and not url.startswith("https:"):
        raise _wrong("GATEWAY", "it must begin with https://")
    return url


def _url(name: str, url: str) -> str:
    if not url:
        raise _wrong(name, "it is missing: give the public address of this shop, followed by /v1/notices/alipay")
    _host(name, url)
    return url


def _host(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        host = ""
    plain = re.fullmatch(r"[\x21-\x7e]+", url) and not re.search(r"[?#@\\]", url) and len(url) <= URL_LENGTH_MAX
    if not host or parts.scheme not in ("https", "http") or not plain:
        raise _wrong(name, f"{url!r} is no http(s) URL without a query, of {URL_LENGTH_MAX} characters at most")
    return host


def _wrong(name: str, why: str) -> InvalidSettings:
    return InvalidSettings(f"{PREFIX}{name}: {why}")
