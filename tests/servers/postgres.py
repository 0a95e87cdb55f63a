"""A real, private PostgreSQL for one test process.

The cluster lives in a temporary folder, listens on a free port of 127.0.0.1 and is durable on purpose (``fsync`` and
``synchronous_commit`` on), so a test that crashes it sees what production would see. Nothing of it outlives the test
process: ``stop()`` removes it, ``atexit`` calls ``stop()``, and a watchdog process cleans up after a killed run.
"""

# The watchdog runs this very file under ``python -I -S``: only the standard library may be imported up here, and
# asyncpg and pytest are imported where they are used.
from __future__ import annotations

import asyncio
import atexit
import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

HOST: Final = "127.0.0.1"
USER: Final = "postgres"

_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": HOST,
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
    "logging_collector": "off",
    # The same zone everywhere, or a test passes on one machine only.
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_POLL: Final = 0.02
_LOG: Final = "postgres.log"
# A unix socket path holds 107 bytes; the folder's and the socket's own names take about 40 of them.
_LONGEST_PARENT: Final = 60


class PostgresError(RuntimeError):
    """The private cluster could not be made, started or removed; the text carries the end of its log."""


class _PortTakenError(Exception):
    """Somebody else bound the port between our choosing it and PostgreSQL's binding it."""


@dataclass(frozen=True, slots=True)
class _Account:
    """Whom the server runs as; ``None`` means as ourselves, which only root may change."""

    uid: int | None = None
    gid: int | None = None

    @property
    def extra_groups(self) -> list[int] | None:
        """No groups of root's for the other account."""
        return None if self.uid is None else []


def find_binaries() -> Path | None:
    """Return the folder holding ``initdb`` and ``postgres``, or ``None``.

    Debian keeps both off the PATH, hence the search; ``pg_config`` may belong to a client library of another version
    than the server's, so its word counts only when the programs are really there.
    """
    for folder in _candidate_folders():
        if all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres")):
            return folder
    return None


def _candidate_folders() -> Iterator[Path]:
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        if bindir := answer.stdout.strip():
            yield Path(bindir)
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent


def _version(bindir: Path) -> tuple[int, ...]:
    """Sort key of ``/usr/lib/postgresql/<version>/bin``: as numbers, for 9.6 is older than 15."""
    return tuple(int(part) for part in bindir.parent.name.split(".") if part.isdigit())


def require_postgres() -> Path:
    """Return the folder of PostgreSQL's programs, or end the test: a failure in CI, a skip elsewhere.

    A skip in CI would be a green run which proved nothing.
    """
    bindir = find_binaries()
    if bindir is None:
        _end_test("PostgreSQL (initdb, postgres) is not installed")
    try:
        _account()
    except PostgresError as error:
        _end_test(str(error))
    return bindir


def _end_test(why: str) -> NoReturn:
    import pytest

    if os.environ.get("CI"):
        pytest.fail(f"{why}. CI must run these tests: run `make services` before them.", pytrace=False)
    pytest.skip(f"NOT TESTED AGAINST POSTGRESQL: {why}. Run `make services` to install it.", allow_module_level=True)


def _account() -> _Account:
    """Choose whom to run as: PostgreSQL refuses root, so root hands over to the user ``postgres``."""
    if os.geteuid() != 0:
        return _Account()
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        entry = None
    if entry is None or entry.pw_uid == 0:
        raise PostgresError(
            f"PostgreSQL refuses to run as root and there is no unprivileged user {USER!r} to run it as: "
            f"run the tests as an ordinary user, or create one (useradd --system {USER})"
        )
    return _Account(entry.pw_uid, entry.pw_gid)


def _make_folder(account: _Account) -> Path:
    """Make the temporary folder, owned by the account.

    The usual temporary folder may be useless: closed to the other account, or too deep for a unix socket in it.
    """
    for parent in (Path(tempfile.gettempdir()).resolve(), Path("/tmp")):
        open_to_all = all(folder.stat().st_mode & 0o001 for folder in (parent, *parent.parents))
        if len(os.fsencode(parent)) <= _LONGEST_PARENT and (account.uid is None or open_to_all):
            break
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pg-", dir=parent))
    if account.uid is not None and account.gid is not None:
        os.chown(folder, account.uid, account.gid)
    return folder


def _is_deserted(folder: Path) -> bool:
    """Whether no process of the server is left: each one holds a shared lock through its inherited log file."""
    try:
        with (folder / _LOG).open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _remove_folder(folder: Path, patience: float = 10.0) -> None:
    """Remove the folder once the server's last process has left it.

    Pulled away from under a living one, ``initdb``'s above all, it makes that one abort and leave its shared memory
    behind for ever. Whoever stays beyond our patience loses the folder all the same.
    """
    deadline = time.monotonic() + patience
    while not _is_deserted(folder) and time.monotonic() < deadline:
        time.sleep(_POLL)
    deadline = time.monotonic() + patience
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > deadline:
            raise PostgresError(f"cannot remove {folder}")
        time.sleep(_POLL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _postmaster(data: Path) -> tuple[int, str]:
    """Read the server's process id and status from its lock file; ``(0, "")`` when there is none.

    A single-user server (``initdb`` runs one) writes its id negated; to ``kill`` that would mean a process group, so
    it counts as none.
    """
    try:
        lines = (data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, ""
    pid = lines[0].strip() if lines else ""
    return int(pid) if pid.isdigit() else 0, lines[7].strip() if len(lines) > 7 else ""


def _watch(parent: int, folder: Path) -> None:
    """Wait until the test process is gone, then end its server and remove the folder.

    Asking for the parent beats PDEATHSIG, which fires when the starting *thread* ends and removes no folder, and beats
    a pipe, which any forked child of the tests would hold open. SIGQUIT, not SIGKILL: the server then takes its
    backends and its shared memory along. ``initdb`` is left to finish, and a server just starting gets the signal when
    it has its lock file.
    """
    while os.getppid() == parent:
        time.sleep(0.2)
    deadline = time.monotonic() + 30
    while not _is_deserted(folder) and time.monotonic() < deadline:
        pid, _ = _postmaster(folder / "data")
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
        time.sleep(0.1)
    _remove_folder(folder)


class PostgresServer:
    """One private PostgreSQL cluster: ``with PostgresServer() as server: server.url(server.create_database())``.

    ``settings`` go into ``postgresql.conf`` after our own and win. The methods block; they may be called where an
    event loop runs, but hold it up meanwhile.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, start_timeout: float = 60.0) -> None:
        """Remember the wishes; nothing runs before ``start()``."""
        self._settings = {**_SETTINGS, **(settings or {})}
        self._start_timeout = start_timeout
        self._owner = 0
        self._port = 0
        self._folder: Path | None = None
        self._bindir = Path()
        self._account = _Account()
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start, and give the running server."""
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop, whatever happened."""
        self.stop()

    @property
    def folder(self) -> Path:
        """The temporary folder: ``data/``, ``postgres.log`` and the unix socket."""
        if self._folder is None:
            raise PostgresError("the server is not started")
        return self._folder

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; it stays the same over ``crash()`` and ``restart()``."""
        if not self._port:
            raise PostgresError("the server is not started")
        return self._port

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._process is not None and self._process.poll() is None

    def url(self, database: str) -> str:
        """Return SQLAlchemy's address of the database."""
        return f"postgresql+asyncpg://{USER}@{HOST}:{self.port}/{database}"

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self._log_since(0).splitlines()[-lines:])

    def start(self) -> None:
        """Make a fresh cluster and return when it takes connections; nothing is left behind when that fails."""
        if self._folder is not None:
            raise PostgresError("the server is already started: use restart()")
        bindir = find_binaries()
        if bindir is None:
            raise PostgresError("PostgreSQL (initdb, postgres) is not installed: run `make services`")
        self._bindir, self._account, self._owner = bindir, _account(), os.getpid()
        self._folder = _make_folder(self._account)
        atexit.register(self.stop)
        try:
            self._start_watchdog()
            self._initdb()
            self._launch(_free_port)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and remove its folder; harmless when it never ran.

        A forked child of the tests inherits this object and the ``atexit`` entry, but not the server: there it does
        nothing.
        """
        folder = self._folder
        if folder is None or os.getpid() != self._owner:
            return
        try:
            # The data is thrown away: a shutdown checkpoint would buy nothing.
            self._halt(signal.SIGQUIT)
            _remove_folder(folder)
        finally:
            self._stop_watchdog()
            atexit.unregister(self.stop)
            self._folder, self._port = None, 0

    def crash(self) -> None:
        """Stop as ``pg_ctl stop -m immediate`` does: no checkpoint, clients cut off, recovery at the next start."""
        if not self.running:
            raise PostgresError("the server does not run: there is nothing to crash")
        self._halt(signal.SIGQUIT)

    def restart(self) -> None:
        """Start again on the same data and port; a running server is shut down in good order before."""
        port = self.port
        self._halt(signal.SIGINT)
        self._launch(lambda: port)

    def create_database(self, template: str | None = None) -> str:
        """Create a database of a new unique name and return the name.

        With a ``template`` it is a copy of that database, schema and rows, which nobody may be connected to. Without,
        it copies ``template0``: nobody can be connected to that, so parallel calls never fail on it.
        """
        name = f"test_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {_quoted(name)} TEMPLATE {_quoted(template or 'template0')}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop the database, cutting off whoever is still connected; a missing one is fine."""
        self._execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        """Run one statement in the maintenance database, on a thread of its own: ours may be running a loop."""
        import asyncpg

        async def run() -> None:
            # Everything is spelled out, or asyncpg would listen to PG* variables of the machine.
            connection = await asyncpg.connect(host=HOST, port=self.port, user=USER, database="postgres", ssl=False)
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(lambda: asyncio.run(run())).result()

    def _initdb(self) -> None:
        data = self.folder / "data"
        # --no-sync spares the disk only before the first start; the server itself syncs.
        flags = ("--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync", f"--username={USER}")
        process = self._spawn("initdb", "-D", str(data), *flags)
        try:
            code = process.wait(self._start_timeout)
        except BaseException as error:
            # A gentler signal makes it remove the data from under its own backend: see _remove_folder.
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise PostgresError(f"initdb is not done in {self._start_timeout} s:\n{self.log_tail()}") from None
            raise
        self._process = None
        if code != 0:
            raise PostgresError(f"initdb failed with {code}:\n{self.log_tail()}")
        settings = {"unix_socket_directories": str(self.folder), **self._settings}
        with (data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            for name, value in settings.items():
                doubled = value.replace("'", "''")
                conf.write(f"{name} = '{doubled}'\n")

    def _launch(self, choose_port: Callable[[], int]) -> None:
        """Start the server process, again when the port was taken meanwhile, until the deadline.

        That goes for a restart too: our free port is one the system may lend to any outgoing connection while we are
        down.
        """
        deadline = time.monotonic() + self._start_timeout
        while True:
            port = choose_port()
            try:
                self._launch_once(port, deadline)
            except _PortTakenError:
                if time.monotonic() > deadline:
                    raise PostgresError(f"port {port} stays taken:\n{self.log_tail()}") from None
                time.sleep(_POLL)
            else:
                self._port = port
                return

    def _launch_once(self, port: int, deadline: float) -> None:
        log_start = self._log.stat().st_size
        # Our own child rather than pg_ctl's detached one: we see it die, and no process id can be mistaken.
        process = self._spawn("postgres", "-D", str(self.folder / "data"), "-c", f"port={port}")
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._process = None
                if "Address already in use" in self._log_since(log_start):
                    raise _PortTakenError
                raise PostgresError(f"PostgreSQL ended with {process.returncode} at start:\n{self.log_tail()}")
            # A connection would prove less: on a port taken meanwhile it reaches somebody else's server.
            if _postmaster(self.folder / "data") == (process.pid, "ready"):
                return
            time.sleep(_POLL)
        raise PostgresError(f"PostgreSQL is not ready in {self._start_timeout} s:\n{self.log_tail()}")

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs as the account, writing to the log; ``stop()`` knows it from here on."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        with self._log.open("ab") as log:
            # Inherited with the file by the program and all its children, and so held until the last of them is gone.
            fcntl.flock(log, fcntl.LOCK_SH)
            self._process = subprocess.Popen(
                [str(self._bindir / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                # LC_ALL=C keeps the log English: it is searched for a taken port.
                env={**kept, "HOME": str(self.folder), "LC_ALL": "C"},
                user=self._account.uid,
                group=self._account.gid,
                extra_groups=self._account.extra_groups,
                # Ctrl-C in the terminal is for the tests: they stop the server when they are done with it.
                start_new_session=True,
            )
        return self._process

    def _halt(self, first: signal.Signals) -> None:
        """End the child by the signal, and by harder ones if it does not listen."""
        process = self._process
        if process is None:
            return
        for number, patience in ((first, 30.0), (signal.SIGQUIT, 15.0), (signal.SIGKILL, None)):
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
        self._process = None

    def _start_watchdog(self) -> None:
        # As ourselves, not as the account: that one may have no access to our Python.
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(self._owner), str(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Out of our process group, for whoever kills us may well kill the whole group.
            start_new_session=True,
        )

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
            self._watchdog = None

    @property
    def _log(self) -> Path:
        log = self.folder / _LOG
        log.touch()
        return log

    def _log_since(self, offset: int) -> str:
        return self._log.read_bytes()[offset:].decode("utf-8", "replace")


def _quoted(identifier: str) -> str:
    doubled = identifier.replace('"', '""')
    return f'"{doubled}"'


if __name__ == "__main__":
    _watch(int(sys.argv[1]), Path(sys.argv[2]))
