"""The wire: one POST over a connection of its own, made to the very address that was checked."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Mapping
from typing import Any

import httpcore

from holdfast.clock import Clock
from holdfast.services.webhooks.model import ANSWER_BYTES_MAX, Answer, ForbiddenUrl, Target
from holdfast.services.webhooks.needs import Resolver

ADDRESSES_MAX = 4  # tried one after the other


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once, checks every address, and connects to these addresses and nothing else.

    There is no second look at the name between the check and the connection, so a name that changes its mind gains
    nothing. The certificate is still checked against the name.
    """

    def __init__(self, resolver: Resolver, inner: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._resolver = resolver
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers; raises `ForbiddenUrl` before any connection."""
        try:
            addresses = await self._resolver.addresses(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from error
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses[:ADDRESSES_MAX]:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's signature
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refused: no URL names one."""
        raise ForbiddenUrl

    async def sleep(self, seconds: float) -> None:
        """Only between tries of the pool, which makes none."""
        await self._inner.sleep(seconds)


class HttpWire:
    """Posts to endpoints. No proxy, no redirects, no cookies, no connection used twice."""

    def __init__(
        self, resolver: Resolver, clock: Clock, timeout_ms: int, *, trust: ssl.SSLContext | None = None
    ) -> None:
        self._clock = clock
        self._timeout_s = timeout_ms / 1_000
        self._backend = PinnedBackend(resolver)
        self._trust = trust
        self._pools: dict[str, httpcore.AsyncConnectionPool] = {}

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Post a body; the status counts once it is there, however the rest of the answer fares."""
        began = self._clock.monotonic()
        answer = Answer()
        try:
            async with asyncio.timeout(self._timeout_s):
                pool = await self._pool(target.scheme)
                async with pool.stream("POST", _url(target), headers=_raw(headers), content=body) as response:
                    answer = Answer(status=response.status, retry_after_s=_retry_after(response.headers))
                    answer = _with(answer, text=_text(await _beginning(response)))
        except Exception as error:
            if answer.status is None:
                answer = Answer(error=_told(error, self._timeout_s))
        return _with(answer, took_ms=round((self._clock.monotonic() - began) * 1_000))

    async def close(self) -> None:
        """Give back what is still open."""
        for pool in self._pools.values():
            await pool.aclose()

    async def _pool(self, scheme: str) -> httpcore.AsyncConnectionPool:
        """The pool of a scheme; the certificates we trust are read when a request first needs them: that takes long."""
        if scheme not in self._pools:
            if scheme == "https" and self._trust is None:
                self._trust = await asyncio.to_thread(ssl.create_default_context)
            made = httpcore.AsyncConnectionPool(
                ssl_context=self._trust,
                max_connections=None,  # the lanes bound them
                max_keepalive_connections=0,  # the name is resolved and checked for every request
                network_backend=self._backend,
            )
            self._pools.setdefault(scheme, made)
        return self._pools[scheme]


def _url(target: Target) -> httpcore.URL:
    return httpcore.URL(
        scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
    )


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _beginning(response: httpcore.Response) -> bytes:
    found = b""
    async for part in response.aiter_stream():
        found += part
        if len(found) >= ANSWER_BYTES_MAX:
            break
    return found[:ANSWER_BYTES_MAX]


def _retry_after(headers: list[tuple[bytes, bytes]]) -> int | None:
    found = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
    return int(found) if found.isdigit() and len(found) <= 9 else None


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace").replace("\x00", "\N{REPLACEMENT CHARACTER}")  # no database stores a NUL


def _told(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return _text(f"{type(error).__name__}: {error}".encode(errors="replace")[:300])


def _with(answer: Answer, **changed: Any) -> Answer:
    fields: dict[str, Any] = {name: getattr(answer, name) for name in answer.__struct_fields__}
    return Answer(**fields | changed)
