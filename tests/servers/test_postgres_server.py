"""The PostgreSQL harness itself: what every other database test stands on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.servers import postgres
from tests.servers.postgres import PostgresError, PostgresServer, find_binaries, require_postgres

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    require_postgres()
    with PostgresServer() as started:
        yield started


@pytest.fixture
def database(server: PostgresServer) -> Iterator[str]:
    name = server.create_database()
    yield name
    server.drop_database(name)


def ask(server: PostgresServer, database: str, *statements: str) -> object:
    """Run the statements in one connection and return the single value the last one gives."""

    async def run() -> object:
        connection = await asyncpg.connect(server.url(database).replace("+asyncpg", ""))
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    return asyncio.run(run())


def wait_until_gone(pid: int, folder: Path, patience: float = 20.0) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not folder.exists() and not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    """Whether the process runs; an orphan nobody reaps (a container without init) is dead all the same."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def test_starts_durable_and_on_loopback_only(server: PostgresServer, database: str) -> None:
    expected = {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "max_connections": "200",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": str(server.folder),
        "port": str(server.port),
    }
    assert {name: ask(server, database, f"SHOW {name}") for name in expected} == expected
    assert server.url("shop") == f"postgresql+asyncpg://postgres@127.0.0.1:{server.port}/shop"


def test_committed_rows_survive_a_crash(server: PostgresServer, database: str) -> None:
    ask(server, database, "CREATE TABLE held (n int)", "INSERT INTO held VALUES (1), (2)", "SELECT 1")
    port = server.port

    server.crash()

    assert not server.running
    with pytest.raises(OSError, match=r"Connect call failed|refused"):
        ask(server, database, "SELECT 1")

    server.restart()

    assert server.port == port
    assert ask(server, database, "SELECT sum(n) FROM held") == 3
    assert "database system was not properly shut down" in server.log_tail(), "it was no crash"


def test_a_running_server_restarts_in_good_order(server: PostgresServer, database: str) -> None:
    ask(server, database, "CREATE TABLE held (n int)", "INSERT INTO held VALUES (7)", "SELECT 1")

    server.restart()

    assert ask(server, database, "SELECT n FROM held") == 7
    assert "database system was shut down at" in server.log_tail(10)


def test_two_databases_are_separate(server: PostgresServer, database: str) -> None:
    other = server.create_database()
    assert other != database
    ask(server, database, "CREATE TABLE mine (n int)", "SELECT 1")
    assert ask(server, database, "SELECT to_regclass('mine') IS NOT NULL") is True
    assert ask(server, other, "SELECT to_regclass('mine') IS NULL") is True

    server.drop_database(other)

    with pytest.raises(asyncpg.InvalidCatalogNameError):
        ask(server, other, "SELECT 1")
    server.drop_database(other)


def test_a_template_is_copied_with_its_rows(server: PostgresServer, database: str) -> None:
    ask(server, database, "CREATE TABLE stock (n int)", "INSERT INTO stock VALUES (5)", "SELECT 1")

    copy = server.create_database(template=database)
    ask(server, copy, "UPDATE stock SET n = 4", "SELECT 1")

    assert ask(server, copy, "SELECT n FROM stock") == 4
    assert ask(server, database, "SELECT n FROM stock") == 5
    server.drop_database(copy)


def test_databases_come_and_go_while_a_loop_runs(server: PostgresServer) -> None:
    async def run() -> None:
        name = server.create_database()
        connection = await asyncpg.connect(server.url(name).replace("+asyncpg", ""))
        server.drop_database(name)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetchval("SELECT 1")
        connection.terminate()

    asyncio.run(run())


def test_stop_leaves_neither_process_nor_folder() -> None:
    require_postgres()
    server = PostgresServer()
    server.start()
    folder, pid = server.folder, int((server.folder / "data" / "postmaster.pid").read_text().split()[0])
    with pytest.raises(PostgresError, match=r"use restart"):
        server.start()

    server.stop()

    assert not folder.exists()
    assert not is_alive(pid)
    assert not server.running
    with pytest.raises(PostgresError, match="not started"):
        server.url("postgres")
    server.stop()


def test_a_taken_port_is_given_up_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    require_postgres()
    choose = postgres._free_port
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken: int = holder.getsockname()[1]
        answers = iter([taken])
        monkeypatch.setattr(postgres, "_free_port", lambda: next(answers, None) or choose())
        with PostgresServer() as server:
            assert server.port != taken
            assert ask(server, "postgres", "SELECT 1") == 1


def test_a_failed_start_shows_the_log_and_leaves_nothing() -> None:
    require_postgres()
    server = PostgresServer(settings={"no_such_setting": "1"})
    seen: list[Path] = []
    stop = server.stop

    def recording_stop() -> None:
        seen.append(server.folder)
        stop()

    server.stop = recording_stop  # type: ignore[method-assign]
    with pytest.raises(PostgresError, match='unrecognized configuration parameter "no_such_setting"'):
        server.start()
    assert len(seen) == 1
    assert not seen[0].exists()


@pytest.mark.parametrize("end", ["kill", "exit", "thread"])
def test_the_server_does_not_outlive_its_test_process(end: str) -> None:
    """Killed outright, or ended without ``stop()``; started on the main thread or on one that has ended."""
    require_postgres()
    script = f"""
import sys, threading
from tests.servers.postgres import PostgresServer
server = PostgresServer()
if {end == "thread"}:
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
else:
    server.start()
server.create_database()
print(server._process.pid, server.folder, flush=True)
sys.stdin.readline()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        pid, folder = child.stdout.readline().split()
        assert is_alive(int(pid))
        if end != "exit":
            child.send_signal(signal.SIGKILL)
    assert wait_until_gone(int(pid), Path(folder))


def test_a_forked_child_does_not_stop_the_server(server: PostgresServer) -> None:
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert server.running
    assert ask(server, "postgres", "SELECT 1") == 1


def test_missing_postgres_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "find_binaries", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="NOT TESTED AGAINST POSTGRESQL"):
        require_postgres()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make services"):
        require_postgres()


def test_found_binaries_can_be_run() -> None:
    bindir = require_postgres()
    assert bindir == find_binaries()
    answer = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("postgres (PostgreSQL)")
