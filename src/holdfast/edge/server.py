"""Run the API, the workers, or both in this process, until a signal asks to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
import uvloop
from litestar.types import ASGIApp

from holdfast import observe
from holdfast.bootstrap import System, running
from holdfast.clock import Clock
from holdfast.edge.http.app import build_app
from holdfast.edge.http.connection import Connection
from holdfast.errors import InvalidSettings
from holdfast.settings import HttpSettings, Settings

BACKLOG = 2_048

log = observe.logger("server")


class ApiServer(uvicorn.Server):
    """uvicorn without its own signal handling: it would kill the process before the workers have drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(main: Callable[[], Awaitable[int]]) -> int:
    """Run a coroutine on uvloop to its end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_as_coroutine(main))


async def serve(settings: Settings, *, work: bool, on_ready: Callable[[str], None]) -> int:
    """Serve the API, with the workers unless told otherwise; `on_ready` gets the URL once it listens."""
    stop = stop_event()
    async with running(settings) as system:
        if work:
            system.work()
        async with listening(system) as url:
            on_ready(url)
            await stop.wait()
            log.info("stopping")
    return 0


async def work(settings: Settings, on_ready: Callable[[], None]) -> int:
    """Run the workers only."""
    stop = stop_event()
    async with running(settings) as system:
        system.work()
        on_ready()
        await stop.wait()
        log.info("stopping")
    return 0


@contextlib.asynccontextmanager
async def listening(system: System) -> AsyncIterator[str]:
    """The API of a running system on its configured address; gives the URL, stops accepting and drains at the end."""
    app = build_app(system)  # before the socket is bound: it may refuse the settings
    drain_s = max(1, system.settings.messaging.drain_ms // 1_000)
    async with listening_on(app, system.settings.http, system.clock, drain_s) as url:
        yield url


@contextlib.asynccontextmanager
async def listening_on(app: ASGIApp, settings: HttpSettings, clock: Clock, drain_s: int) -> AsyncIterator[str]:
    """An application on an address; gives the URL, stops accepting and drains for at most so long at the end."""
    bound = _bind(settings.host, settings.port)
    config = uvicorn.Config(
        app,
        http=_connection(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody's X-Forwarded-For is believed
        backlog=BACKLOG,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=drain_s,
    )
    server = ApiServer(config)
    task = asyncio.create_task(server.serve(sockets=[bound]), name="api")
    try:
        while not server.started and not task.done():
            await clock.sleep(0.005)
        if task.done():
            task.result()
        yield _url(settings.host, bound.getsockname()[1])
    finally:
        server.should_exit = True
        await task


def _connection(settings: HttpSettings) -> Any:
    """What uvicorn calls for each client, as it would a protocol class."""
    return partial(Connection, head_bytes_max=settings.head_bytes_max, head_timeout_s=settings.head_timeout_ms / 1_000)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise InvalidSettings(f"HOLDFAST_HTTP__HOST: {host!r} is no address of this machine: {error}") from error
    # Said to be TCP, or asyncio leaves Nagle's algorithm on for its connections.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        keys = "HOLDFAST_HTTP__HOST and HOLDFAST_HTTP__PORT"
        raise InvalidSettings(f"cannot listen on {host}:{port}: {error.strerror}; set {keys}") from error
    return bound


def stop_event() -> asyncio.Event:
    """Set once a signal asks to stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop.set)
    return stop


async def _as_coroutine(main: Callable[[], Awaitable[int]]) -> int:
    return await main()
