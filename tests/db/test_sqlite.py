"""SQLite: one process writes, one transaction at a time, and what its file may go through."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text

from holdfast.db.connect import connect
from holdfast.db.database import Database, Tx
from holdfast.db.sqlite import MEMORY, SqliteDatabase
from holdfast.errors import DatabaseInUse, HoldfastError, InvalidSettings, Unavailable
from holdfast.settings import DatabaseSettings
from tests.db.jars import content, make_jars, put, seen

ROOT = Path(__file__).resolve().parents[2]

OPEN_IN_ANOTHER_PROCESS = """
import asyncio, sys
from holdfast.db.connect import connect
from holdfast.errors import HoldfastError
from holdfast.settings import DatabaseSettings
from tests.db.jars import content, put

async def main(path, how):
    try:
        database = await connect(DatabaseSettings(url=f"sqlite:///{path}"), read_only=how == "read")
    except HoldfastError as error:
        print(error.code, error.detail)
        return
    if how == "write":
        async with database.transaction() as tx:
            await put(tx, "other")
    print("opened", sorted(await content(database)), flush=True)
    if how == "hold":
        sys.stdin.readline()
    await database.close()

asyncio.run(main(*sys.argv[1:]))
"""


def in_another_process(path: Path, how: str) -> str:
    command = [sys.executable, "-c", OPEN_IN_ANOTHER_PROCESS, str(path), how]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@contextmanager
def another_process_that_holds(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the file open for writing until it is killed or the block ends."""
    command = [sys.executable, "-c", OPEN_IN_ANOTHER_PROCESS, str(path), "hold"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "opened ['a']\n"
        yield holder


def killed_by_itself(code: str) -> bool:
    """Run the code in another process; answers whether SIGKILL ended it."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == -9


@asynccontextmanager
async def opened(path: Path | str, **how: Any) -> AsyncIterator[Database]:
    database = await connect(DatabaseSettings(url=URL.create("sqlite", database=str(path)).render_as_string()), **how)
    try:
        yield database
    finally:
        await database.close()


async def answer(database: Database, statement: str) -> Any:
    async with database.transaction() as tx:
        return (await tx.execute(text(statement))).scalar_one()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


async def test_commits_are_synced_and_the_log_is_written_ahead(path: Path) -> None:
    async with opened(path) as database:
        asked = ("journal_mode", "synchronous", "foreign_keys")
        assert [await answer(database, f"PRAGMA {name}") for name in asked] == ["wal", 2, 1]


async def test_a_second_transaction_in_the_same_task_is_refused_instead_of_waiting_for_itself(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database)

        async def nest() -> None:
            async with database.transaction() as tx:
                await put(tx, "outer")
                async with database.transaction():
                    pass

        with pytest.raises(RuntimeError, match="already has a transaction open"):
            await nest()
        assert await content(database) == {}
        async with database.transaction() as tx:
            await put(tx, "next")
        assert await content(database) == {"next": 0}


async def test_transactions_of_two_tasks_take_turns(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database)
        steps: list[str] = []

        async def work(name: str) -> None:
            async with database.transaction() as tx:
                steps.append(f"{name} begins")
                await put(tx, name)
                steps.append(f"{name} ends")

        await asyncio.gather(work("a"), work("b"), work("c"))
        assert steps == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]


async def test_a_second_writing_process_is_refused_and_told_who_writes(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database, "a")
        said = in_another_process(path, "write")
        assert said.startswith("database_in_use ")
        assert str(os.getpid()) in said
        assert "PostgreSQL" in said
        assert await content(database) == {"a": 0}
    assert in_another_process(path, "write") == "opened ['a', 'other']"


async def test_a_reading_process_sees_what_is_committed_while_another_one_writes(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database, "a")
        async with database.transaction() as tx:
            await put(tx, "not yet")
            assert in_another_process(path, "read") == "opened ['a']"
    assert in_another_process(path, "read") == "opened ['a', 'not yet']"


async def test_the_lock_is_given_back_when_its_process_is_killed(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database, "a")
    with another_process_that_holds(path) as holder:
        with pytest.raises(DatabaseInUse, match=f"process {holder.pid} writes"):
            await connect(DatabaseSettings(url=f"sqlite:///{path}"))
        holder.kill()
    async with opened(path) as database:
        assert await content(database) == {"a": 0}


async def test_a_second_opening_in_the_same_process_is_refused_too(path: Path) -> None:
    async with opened(path) as database:
        with pytest.raises(DatabaseInUse):
            await connect(DatabaseSettings(url=f"sqlite:///{path}"))
        await make_jars(database, "a")
    async with opened(path) as database:
        assert await content(database) == {"a": 0}


async def test_another_name_of_the_same_file_is_no_way_around_the_lock(path: Path) -> None:
    async with opened(path):
        link = path.with_name("link.db")
        link.symlink_to(path)
        with pytest.raises(DatabaseInUse):
            async with opened(link):
                pass


async def test_a_read_only_database_reads_and_refuses_to_write(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database, "a")
    async with opened(path, read_only=True) as database:
        assert await content(database) == {"a": 0}
        with pytest.raises(Unavailable, match="read-only"):
            async with database.transaction():
                pass
    assert (path.parent / "shop.db").exists()


async def test_a_file_that_is_not_there_is_not_created_by_reading(path: Path) -> None:
    with pytest.raises(InvalidSettings, match="holdfast migrate"):
        await connect(DatabaseSettings(url=f"sqlite:///{path}"), read_only=True)
    assert list(path.parent.iterdir()) == []


async def test_a_missing_folder_and_a_folder_instead_of_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="does not exist"):
        await connect(DatabaseSettings(url=f"sqlite:///{tmp_path}/nowhere/shop.db"))
    with pytest.raises(InvalidSettings, match="is a folder"):
        await connect(DatabaseSettings(url=f"sqlite:///{tmp_path}"))


@pytest.fixture
def no_database(path: Path) -> Path:
    path.write_bytes(b"these are no pages of a database" * 200)
    return path


async def test_a_file_that_is_no_database_is_refused_in_our_words(no_database: Path) -> None:
    with pytest.raises(HoldfastError, match="database"):
        async with opened(no_database):
            pass


@pytest.mark.parametrize(
    "name", ["two words.db", "50% off.db", "50%25 off.db", "a#b.db", "a?b.db", "käse.db", "a&mode=memory.db"]
)
async def test_reader_and_writer_open_the_same_file_whatever_its_name(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path / name) as database:
        await make_jars(database, "a")
        assert await content(database) == {"a": 0}
    assert (tmp_path / name).exists()
    async with opened(tmp_path / name, read_only=True) as database:
        assert await content(database) == {"a": 0}


async def test_a_database_in_memory_reads_and_writes() -> None:
    database = await connect(DatabaseSettings(url="sqlite://"))
    await make_jars(database, "a")
    async with database.read(snapshot=True) as tx:
        assert await seen(tx) == {"a": 0}
    await database.close()


class Brake:
    """An SQL function that holds a statement where it is until released."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.reached = asyncio.Event()
        self.release = threading.Event()

    async def fit(self, tx: Tx) -> None:
        raw = await tx.connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.create_function("brake", 0, self._brake)

    def _brake(self) -> int:
        self._loop.call_soon_threadsafe(self.reached.set)
        return int(self.release.wait(20))


@pytest.mark.parametrize("where", ["file", "memory"])
async def test_a_transaction_cancelled_in_the_middle_of_a_statement_leaves_the_rest_as_it_was(
    path: Path, where: str
) -> None:
    async with opened(path if where == "file" else ":memory:") as database:
        await make_jars(database, "before")
        brake = Brake()

        async def work() -> None:
            async with database.transaction() as tx:
                await brake.fit(tx)
                await put(tx, "never")
                await tx.execute(text("INSERT INTO jar (name, beans) SELECT 'stopped', brake()"))

        task = asyncio.create_task(work())
        await brake.reached.wait()
        task.cancel()
        brake.release.set()
        await asyncio.wait([task])
        assert task.cancelled()

        async with asyncio.timeout(20), database.transaction() as tx:
            assert await seen(tx) == {"before": 0}
            await put(tx, "after")
        assert await content(database) == {"before": 0, "after": 0}


async def test_a_full_disk_is_unavailable_and_changes_nothing(path: Path) -> None:
    async with opened(path) as database:
        await make_jars(database, "before")
        pages = await answer(database, "PRAGMA page_count")
        await answer(database, f"PRAGMA max_page_count = {pages}")

        async def fill() -> None:
            async with database.transaction() as tx:
                for number in range(10_000):
                    await put(tx, f"jar with a rather long name, number {number}")

        with pytest.raises(Unavailable, match="full"):
            await fill()
        assert await content(database) == {"before": 0}

        await answer(database, "PRAGMA max_page_count = 100000")
        async with database.transaction() as tx:
            await put(tx, "after")
        assert await content(database) == {"before": 0, "after": 0}


async def test_what_was_committed_is_there_after_the_process_is_killed(path: Path) -> None:
    code = f"""
import asyncio, os, signal
from holdfast.db.connect import connect
from holdfast.settings import DatabaseSettings
from tests.db.jars import make_jars, put

async def main():
    database = await connect(DatabaseSettings(url="sqlite:///{path}"))
    await make_jars(database, "committed")
    async with database.transaction() as tx:
        await put(tx, "not committed")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    assert killed_by_itself(code)
    async with opened(path) as database:
        assert await content(database) == {"committed": 0}


async def test_a_database_in_memory_survives_whoever_is_cancelled_at_any_moment() -> None:
    database = await SqliteDatabase.open(MEMORY)

    async def write() -> None:
        async with database.transaction() as tx:
            await tx.execute(text("INSERT INTO t VALUES (1)"))

    async with database.transaction() as tx:
        await tx.execute(text("CREATE TABLE t (n INTEGER)"))
    for turns in range(40):
        writer = asyncio.create_task(write())
        for _ in range(turns):
            await asyncio.sleep(0)
        writer.cancel()
        await asyncio.wait([writer])
    async with database.read() as tx:
        before = (await tx.execute(text("SELECT count(*) FROM t"))).scalar_one()
    await write()
    async with database.read() as tx:
        assert (await tx.execute(text("SELECT count(*) FROM t"))).scalar_one() == before + 1
    await database.close()
