"""holdfast as real processes: started on a database with quick settings, killed, stopped, started again.

Standard output and standard error of each process go to files: nothing blocks, and all can be read after a kill.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from holdfast.bootstrap import migrate_all
from holdfast.clock import SystemClock
from holdfast.edge.http.auth import SCOPES, Tokens
from holdfast.settings import DatabaseSettings, Settings

HOST = "127.0.0.1"
TOKEN_SECRET = "token-secret-for-tests-of-32-bytes!!"
NOTICE_SECRET = "sandbox-secret-for-tests"
TOKEN_VALID_S = 7_200
START_S = 30.0
END_S = 30.0
POLL_S = 0.02

T = TypeVar("T")


class Finding(msgspec.Struct):
    """A broken promise, as `holdfast verify --json` prints it."""

    name: str
    count: int
    rows: list[dict[str, object]]


class Verdict(msgspec.Struct):
    """What `holdfast verify --json` prints."""

    clean: bool
    checks: int
    figures: dict[str, int]
    findings: list[Finding]


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    code: int
    out: str
    err: str


async def until(condition: Callable[[], T | None], what: str, wait_s: float) -> T:
    """Poll until the condition gives something, and give that; fails with `what` when the deadline passes first."""
    deadline = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {wait_s} s: {what}"
        await asyncio.sleep(POLL_S)
    return found


def quick_environment(url: str, **changes: str) -> dict[str, str]:
    """The environment of a process that retries, sweeps and gives up in fractions of a second.

    `changes` are names without the prefix, e.g. `ORDERS__TIME_OUT_MS="60000"`.
    """
    wanted = {
        "DATABASE": url,
        "MESSAGING__LEASE_MS": "1000",
        "MESSAGING__POLL_MS": "200",
        "MESSAGING__LOCAL_INTERVAL_MS": "20",
        "MESSAGING__DURABLE_INTERVAL_MS": "100",
        "MESSAGING__DURABLE_INTERVAL_MS_MAX": "500",
        "ORDERS__TIME_OUT_MS": "1500",
        "ORDERS__SWEEP_MS": "300",
        "STOCK__GUARD_MS": "2500",
        "PAYMENTS__SANDBOX": "true",
        "PAYMENTS__SANDBOX_SECRET": NOTICE_SECRET,
        "PAYMENTS__SWEEP_MS": "300",
        "HTTP__TOKEN_SECRET": TOKEN_SECRET,
        "HTTP__REQUEST_TIMEOUT_MS": "5000",
        "LOG__LEVEL": "error",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    return inherited | {f"HOLDFAST_{name}": value for name, value in (wanted | changes).items()}


def free_port() -> int:
    """A port that the system lends to no outgoing connection.

    A killed server must find it free again. One of the ephemeral range may meanwhile become the near end of a client's
    connection, even of one to that very port.
    """
    try:
        first_lent = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except OSError:
        first_lent = 32_768
    while True:
        port = random.randrange(10_000, first_lent)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port


def bearer(subject: str, *, staff: bool = False) -> dict[str, str]:
    """The header of a buyer or of staff."""
    scopes = frozenset(SCOPES) if staff else frozenset()
    return {"authorization": f"Bearer {Tokens(TOKEN_SECRET, SystemClock()).issue(subject, scopes, TOKEN_VALID_S)}"}


class Process:
    """One running `python -m holdfast ...`, in a process group of its own."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], folder: Path, name: str) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "holdfast", *arguments],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, which is its group's too."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """See to it that it is gone."""
        if self.running:
            self.kill()

    async def says(self, wanted: str, wait_s: float = START_S) -> str:
        """Wait for a printed line with these words, and give the line; fails when the process ends before."""

        def line() -> str | None:
            over = not self.running
            for each in self.out.splitlines(keepends=True):
                if wanted in each and each.endswith("\n"):
                    return each.rstrip("\n")
            assert not over, f"{self.name} ended with {self._popen.returncode} and never said {wanted!r}: {self.err}"
            return None

        return await until(line, f"{self.name} says {wanted!r}", wait_s)

    async def ended(self, wait_s: float = END_S) -> Ended:
        """Wait for its end."""
        await until(lambda: not self.running, f"{self.name} ends; it says: {self.out} {self.err}", wait_s)
        return Ended(self._popen.returncode, self.out, self.err)


class Shop:
    """A database, and the holdfast processes on it."""

    def __init__(self, url: str, folder: Path, **changes: str) -> None:
        self.url = url
        self.folder = folder
        self.environment = quick_environment(url, **changes)
        self._started: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments: str) -> Process:
        """Start a process without waiting for anything."""
        name = f"{len(self._started):03}-{arguments[0]}"
        process = Process(arguments, self.environment, self.folder, name)
        self._started.append(process)
        return process

    async def run(self, *arguments: str) -> Ended:
        """Run a process to its end."""
        return await self.start(*arguments).ended()

    async def migrate(self) -> None:
        """Make the schema, in this process: the command has a test of its own and takes longer."""
        await migrate_all(Settings(database=DatabaseSettings(url=self.url)))

    async def verify(self) -> tuple[int, Verdict]:
        """Audit with no slack: the exit code and the verdict."""
        ended = await self.run("verify", "--slack-ms", "0", "--json")
        assert ended.out, f"verify ended with {ended.code}: {ended.err}"
        return ended.code, msgspec.json.decode(ended.out, type=Verdict)

    def server(self, *options: str) -> Place:
        """A place for `serve` on a port that it keeps; not started."""
        port = free_port()
        return Place(self, ("serve", "--port", str(port), *options), "holdfast listens on", port)

    def worker(self) -> Place:
        """A place for `work`; not started."""
        return Place(self, ("work",), "holdfast works", 0)

    def complaints(self) -> list[str]:
        """What processes wrote to standard error, at log level error; nothing of it is expected."""
        return [f"{each.name} wrote to standard error: {each.err[-2_000:]}" for each in self._started if each.err]

    def close(self) -> None:
        """Kill whatever still runs."""
        for each in self._started:
            each.close()


class Place:
    """Where one long-running process stands; a dead one is replaced by the next, on the same port."""

    def __init__(self, shop: Shop, arguments: tuple[str, ...], ready: str, port: int) -> None:
        self.port = port
        self._shop = shop
        self._arguments = arguments
        self._ready = ready
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    def spawn(self) -> Process:
        """Start without waiting for it to be ready."""
        self._process = self._shop.start(*self._arguments)
        return self._process

    async def start(self) -> None:
        """Start and wait until it is ready."""
        await self.spawn().says(self._ready)

    def kill(self) -> None:
        """`kill -9`."""
        assert self.process.running, f"{self.process.name} died by itself: {self.process.err}"
        self.process.kill()

    async def stop(self, wait_s: float = END_S) -> Ended:
        """SIGTERM, and wait for the end."""
        self.process.send(signal.SIGTERM)
        return await self.process.ended(wait_s)
