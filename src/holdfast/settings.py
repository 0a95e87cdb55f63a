"""Typed settings from a TOML file and the environment; one struct per room, unknown or wrong keys refused by name.

A key of the file `[database] pool_size = 8` is `HOLDFAST_DATABASE__POOL_SIZE=8` in the environment, which wins.
`HOLDFAST_DATABASE` alone is short for `HOLDFAST_DATABASE__URL`. `HOLDFAST_CONFIG` names the file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from holdfast.errors import InvalidSettings

PREFIX = "HOLDFAST_"
CONFIG_KEY = "HOLDFAST_CONFIG"
SHORT_KEYS = {"HOLDFAST_DATABASE": ("database", "url")}
FOREIGN_KEYS = frozenset({CONFIG_KEY})

Milliseconds = Annotated[int, Meta(ge=0, le=366 * 86_400_000)]
Positive = Annotated[int, Meta(ge=1, le=1_000_000)]
Name = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z][a-z0-9_-]*\Z")]


class Secret:
    """A string that does not show itself in logs, reprs or tracebacks; `reveal()` gives the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Secret('***')"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def reveal(self) -> str:
        return self._text


def without_password(url: str) -> str:
    """The URL with its password masked, fit for logs and errors."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url)


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """One room's settings."""


class DatabaseSettings(Section, frozen=True, kw_only=True):
    """`[database]`: where the truth lives."""

    url: str = "sqlite:///holdfast.db"  # or postgresql://user@host/name
    pool_size: Positive = 10  # PostgreSQL connections per process
    readers: Annotated[int, Meta(ge=1, le=64)] = 4  # SQLite read-only connections
    statement_timeout_ms: Milliseconds = 30_000  # PostgreSQL gives up a statement or lock after this
    batch_max: Positive = 200  # requests one group commit takes at most
    queue_max: Positive = 10_000  # requests waiting for a group commit; more are refused

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__} | {"url": without_password(self.url)}
        return f"DatabaseSettings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class MessagingSettings(Section, frozen=True, kw_only=True):
    """`[messaging]`: how messages are claimed and retried."""

    lease_ms: Annotated[int, Meta(ge=1_000, le=3_600_000)] = 30_000  # a claim is void after this unless renewed
    poll_ms: Annotated[int, Meta(ge=10, le=60_000)] = 1_000  # the guard behind wake-ups
    prefetch: Positive = 200  # deliveries a listener holds at once
    local_tries: Annotated[int, Meta(ge=1, le=20)] = 3  # attempts before a durable, delayed retry
    local_interval_ms: Milliseconds = 1_000  # between these attempts
    durable_tries: Annotated[int, Meta(ge=1, le=1_000)] = 10  # delayed rounds before a message is parked
    durable_interval_ms: Milliseconds = 5_000  # before the first delayed round; doubles each time
    durable_interval_ms_max: Milliseconds = 300_000  # up to this
    crashes_max: Annotated[int, Meta(ge=2, le=1_000)] = 5  # deliveries without an outcome before a message is parked
    drain_ms: Milliseconds = 10_000  # how long a stop waits for running handlers


class OrdersSettings(Section, frozen=True, kw_only=True):
    """`[orders]`: rules of placing and expiring."""

    time_out_ms: Annotated[int, Meta(ge=100, le=366 * 86_400_000)] = 1_800_000  # 30 minutes to pay
    sweep_ms: Annotated[int, Meta(ge=50, le=3_600_000)] = 5_000  # the guard behind time-out messages
    extend_ms_max: Milliseconds = 86_400_000  # the latest deadline that staff may give, from when it was placed
    complete_ms: Annotated[int, Meta(ge=1_000, le=366 * 86_400_000)] = 604_800_000  # shipped, then completed by itself
    lines_max: Annotated[int, Meta(ge=1, le=500)] = 50  # per order
    quantity_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 100  # per line


class StockSettings(Section, frozen=True, kw_only=True):
    """`[stock]`: holds."""

    guard_ms: Annotated[int, Meta(ge=100, le=366 * 86_400_000)] = 2_400_000  # then a hold is looked after


class PaymentsSettings(Section, frozen=True, kw_only=True):
    """`[payments]`: providers and their secrets."""

    provider: Name = "sandbox"  # who takes new payments; one of those that are configured
    sandbox: bool = False  # offer the sandbox provider and its pay page; never on a real sale
    sandbox_secret: Secret = Secret("")  # signs pay links and notices; at least 16 characters
    sandbox_url: str = ""  # of `holdfast sandbox-provider`; empty for the sandbox within this process
    call_timeout_ms: Annotated[int, Meta(ge=10, le=60_000)] = 5_000  # a provider's later answer is unknown
    merchant_id: str = "holdfast-demo"  # a notice for another merchant is parked
    notice_tolerance_ms: Milliseconds = 300_000  # age at which a signed notice counts as a replay
    sweep_ms: Annotated[int, Meta(ge=50, le=3_600_000)] = 5_000  # refunds asked for again
    poll_ms: Annotated[int, Meta(ge=50, le=3_600_000)] = 20_000  # providers asked about payments unpaid for so long
    alipay_app_id: str = ""  # switches Alipay on: the app's id at open.alipay.com
    alipay_seller_id: str = ""  # the merchant's account there, 16 digits from 2088 on
    alipay_private_key: Secret = Secret("")  # the app's private key for RSA2, PEM or base64
    alipay_private_key_file: str = ""  # or the file that holds it
    alipay_public_key: str = ""  # Alipay's public key for this app, PEM or base64
    alipay_public_key_file: str = ""  # or the file that holds it
    alipay_gateway: str = "https://openapi.alipay.com/gateway.do"  # another for Alipay's sandbox
    alipay_notify_url: str = ""  # this shop's public address, followed by /v1/notices/alipay
    alipay_return_url: str = ""  # where the buyer's browser goes after paying
    alipay_subject: str = "Order"  # what the buyer reads, before the order's number


class ReconciliationSettings(Section, frozen=True, kw_only=True):
    """`[reconciliation]`: the books compared with each other and with the provider's."""

    every_ms: Annotated[int, Meta(ge=1_000, le=86_400_000)] = 60_000  # between two comparisons
    slack_ms: Milliseconds = 60_000  # how late the machinery may be before that is a difference
    repair: Literal["ask", "auto"] = "ask"  # auto runs those repairs that are safe without being asked


class EventsSettings(Section, frozen=True, kw_only=True):
    """`[events]`: the event feed."""

    keep_days: Annotated[int, Meta(ge=1, le=3_660)] = 30  # then events and what became of their deliveries are removed
    sweep_ms: Annotated[int, Meta(ge=50, le=86_400_000)] = 600_000  # looking for what is too old


class WebhooksSettings(Section, frozen=True, kw_only=True):
    """`[webhooks]`: events posted to other programs."""

    allow_http: bool = False  # URLs without TLS
    allow_private: bool = False  # addresses that are not public; for intranets
    timeout_ms: Annotated[int, Meta(ge=100, le=60_000)] = 15_000  # for the whole of one attempt
    at_once: Annotated[int, Meta(ge=1, le=64)] = 4  # attempts at the same time to one endpoint, in each process
    endpoints_max: Annotated[int, Meta(ge=1, le=1_000)] = 100  # more are refused
    overlap_ms: Milliseconds = 86_400_000  # how long the former secret signs too after a rotation
    flag_after_ms: Milliseconds = 432_000_000  # an endpoint that took nothing for so long is flagged
    sweep_ms: Annotated[int, Meta(ge=50, le=3_600_000)] = 5_000  # the guard behind wake-ups


class HttpSettings(Section, frozen=True, kw_only=True):
    """`[http]`: the edge."""

    host: str = "127.0.0.1"  # address to listen on
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8_000  # 0 for a free one
    token_secret: Secret = Secret("")  # signs bearer tokens; at least 32 bytes
    body_bytes_max: Annotated[int, Meta(ge=1_024, le=10_485_760)] = 65_536  # larger requests are refused
    head_bytes_max: Annotated[int, Meta(ge=1_024, le=1_048_576)] = 32_768  # path and headers of a request
    head_timeout_ms: Annotated[int, Meta(ge=100, le=600_000)] = 10_000  # for the headers to arrive
    request_timeout_ms: Annotated[int, Meta(ge=100, le=600_000)] = 15_000  # then the answer is 503 outcome_unknown


class LogSettings(Section, frozen=True, kw_only=True):
    """`[log]`: what is written to standard error."""

    format: Literal["console", "json"] = "console"  # or json, one object per line
    level: Literal["debug", "info", "warning", "error"] = "info"  # debug, info, warning or error


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set."""

    database: DatabaseSettings = DatabaseSettings()
    messaging: MessagingSettings = MessagingSettings()
    orders: OrdersSettings = OrdersSettings()
    stock: StockSettings = StockSettings()
    payments: PaymentsSettings = PaymentsSettings()
    reconciliation: ReconciliationSettings = ReconciliationSettings()
    events: EventsSettings = EventsSettings()
    webhooks: WebhooksSettings = WebhooksSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the file that HOLDFAST_CONFIG names (if any), then the environment.

    Raises `InvalidSettings` naming the file or variable, what was wrong and, for a misspelt key, the likely one.
    """
    environ = os.environ if environ is None else environ
    sections: dict[str, dict[str, tuple[str, Any]]] = {}
    if path := environ.get(CONFIG_KEY):
        for section, key, value in _file_entries(Path(path)):
            sections.setdefault(section, {})[key] = (f"{path}: [{section}] {key}", value)
    for name, section, key in _environment_entries(environ):
        sections.setdefault(section, {})[key] = (name, environ[name])
    chosen: dict[str, Any] = {section: _section(section, entries) for section, entries in sections.items()}
    return Settings(**chosen)


def _file_entries(path: Path) -> list[tuple[str, str, Any]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"{CONFIG_KEY}: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path} is not valid TOML: {error}") from error
    entries = []
    for section, table in document.items():
        if not isinstance(table, dict):
            raise InvalidSettings(f"{path}: {section!r} stands outside a section; write it below [database] or another")
        _known(section, Settings.__struct_fields__, f"{path}: section [{section}]")
        entries += [(section, key, value) for key, value in table.items()]
    return entries


def _environment_entries(environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    entries = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in FOREIGN_KEYS:
            continue
        if name in SHORT_KEYS:
            section, key = SHORT_KEYS[name]
        else:
            section, _, key = name.removeprefix(PREFIX).lower().partition("__")
            _known(name, _variable_names(), f"variable {name}")
        entries.append((name, section, key))
    # The long form is more specific than the short one, so it is applied later.
    return sorted(entries, key=lambda entry: entry[0] not in SHORT_KEYS)


def _variable_names() -> list[str]:
    return [
        f"{PREFIX}{section.name}__{key}".upper()
        for section in msgspec.structs.fields(Settings)
        for key in section.type.__struct_fields__
    ]


def _section(section: str, entries: dict[str, tuple[str, Any]]) -> Section:
    kind = next(field.type for field in msgspec.structs.fields(Settings) if field.name == section)
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values = {}
    for key, (origin, value) in entries.items():
        _known(key, list(fields), origin)
        try:
            values[key] = msgspec.convert(value, fields[key], strict=False, dec_hook=_decode_secret)
        except msgspec.ValidationError as error:
            shown = "***" if fields[key] is Secret or key == "url" else repr(value)  # a URL may hold a password
            raise InvalidSettings(f"{origin} = {shown} is wrong: {error}") from None
    return kind(**values)  # type: ignore[no-any-return]  # msgspec types Field.type as Any


def _known(name: str, choices: list[str] | tuple[str, ...], origin: str) -> None:
    if name in choices:
        return
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(choices))}"
    raise InvalidSettings(f"{origin} is unknown{hint}")


def _decode_secret(kind: type, value: Any) -> Any:
    if kind is Secret and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise msgspec.ValidationError("it is no UTF-8 text; take 32 or more printable characters") from None
        return Secret(value)
    raise msgspec.ValidationError(f"Expected `str`, got `{type(value).__name__}`")
