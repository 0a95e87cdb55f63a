"""Every command with bad options and settings: one sentence that says what to do, status 2, and nothing created."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest

from holdfast.bootstrap import migrate_all
from holdfast.edge.cli import main
from tests.contract.backends import PostgresSession
from tests.edge.counter import settings_on
from tests.servers.postgres import require_postgres

SECRET = "correct-horse-battery-staple-0123456789"
PASSWORD = "hunter2hunter2"
SIGNED = {
    "HOLDFAST_HTTP__TOKEN_SECRET": SECRET,
    "HOLDFAST_PAYMENTS__SANDBOX": "true",
    "HOLDFAST_PAYMENTS__SANDBOX_SECRET": SECRET,
    "HOLDFAST_HTTP__PORT": "0",
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "serve": ("serve",),
    "work": ("work",),
    "migrate": ("migrate",),
    "verify": ("verify",),
    "token": ("token", "ann"),
    "errors show": ("errors", "show", "1"),
    "errors edit": ("errors", "edit", "1", "--header", "a=b"),
}
on_each_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


def spread(cases: Mapping[str, tuple[Any, ...]], *everywhere: str) -> dict[str, Any]:
    """Parameters: every case with `migrate`, and some of them with every command, for all read settings alike."""
    chosen = {
        f"{command}: {name}": (call, *case)
        for command, call in COMMANDS.items()
        for name, case in cases.items()
        if command == "migrate" or name in everywhere
    }
    return {"argvalues": list(chosen.values()), "ids": list(chosen)}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
    created: list[str]


class Holdfast(Protocol):
    """Runs a command; each environment variable is given by its name."""

    def __call__(self, *arguments: str, **environ: str) -> Ended: ...


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def holdfast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Holdfast:
    """The command line in this process, in a folder of its own, as a terminal without colours sees it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, **environ: str) -> Ended:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["holdfast", *arguments])
        before = files_below(tmp_path)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception:  # what Python itself would print
            traceback.print_exc()
            code = 1
        out, err = capsys.readouterr()
        return Ended(code, out, err, sorted(files_below(tmp_path) - before))

    return run


def cannot(ended: Ended, *says: str) -> None:
    """Check that a command ended with one sentence that says this, having done nothing."""
    assert "Traceback" not in ended.err, ended.err[-1_500:]
    assert ended.code == 2, f"status {ended.code}: {ended.out}{ended.err}"
    assert ended.out == ""
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    for each in says:
        assert each.lower() in lines[0].lower()
    secretive(ended)
    assert ended.created == []


def misused(ended: Ended, *says: str) -> None:
    """Check that a command was refused for how it was called, before it did anything."""
    assert "Traceback" not in ended.err, ended.err[-1_500:]
    assert (ended.code, ended.out) == (2, "")
    assert "Error" in ended.err
    for each in says:
        assert each in ended.err
    secretive(ended)
    assert ended.created == []


def secretive(ended: Ended) -> None:
    for secret in (SECRET, PASSWORD):
        assert secret not in ended.out + ended.err


@pytest.fixture
def _everything_is_closed() -> Iterator[None]:
    """Let a socket that was left open be told in the test that left it, and not in a later one."""
    yield
    gc.collect()


@pytest.fixture
def migrated(tmp_path: Path) -> str:
    """The URL of a database that is ready to be served."""
    folder = tmp_path / "shop"
    folder.mkdir()
    url = f"sqlite:///{folder}/holdfast.db"
    asyncio.run(migrate_all(settings_on(url)))
    return url


def config(folder: Path, content: str | bytes) -> str:
    path = folder / "holdfast.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- Options ----------------------------------------------------------------------------------------------------------

MISUSES: dict[str, tuple[Sequence[str], str]] = {
    "an unknown command": (["sell"], "sell"),
    "a misspelt command": (["migrat"], "migrat"),
    "an unknown option in front": (["--debug", "serve"], "--debug"),
    **{f"{name}: an unknown option": ([*call, "--fast"], "--fast") for name, call in COMMANDS.items()},
    **{f"{name}: one argument too many": ([*call, "more"], "more") for name, call in COMMANDS.items()},
    "serve: port beyond the last": (["serve", "--port", "65536"], "--port"),
    "serve: port below zero": (["serve", "--port", "-1"], "--port"),
    "serve: port in words": (["serve", "--port", "http"], "--port"),
    "serve: no port": (["serve", "--port"], "--port"),
    "serve: port with a point": (["serve", "--port", "80.5"], "--port"),
    "verify: negative slack": (["verify", "--slack-ms", "-1"], "--slack-ms"),
    "verify: endless slack": (["verify", "--slack-ms", "86400001"], "--slack-ms"),
    "verify: slack in words": (["verify", "--slack-ms", "much"], "--slack-ms"),
    "token: for nobody": (["token"], "subject"),
    "token: valid for no time": (["token", "ann", "--valid-s", "0"], "--valid-s"),
    "token: valid since yesterday": (["token", "ann", "--valid-s", "-86400"], "--valid-s"),
    "token: valid for ever": (["token", "ann", "--valid-s", "9999999999"], "--valid-s"),
    "token: valid in words": (["token", "ann", "--valid-s", "long"], "--valid-s"),
    "demo: no buyers": (["demo", "--buyers", "0"], "--buyers"),
    "demo: fewer than no buyers": (["demo", "--buyers", "-1"], "--buyers"),
    "demo: too many buyers": (["demo", "--buyers", "5001"], "--buyers"),
    "demo: buyers in words": (["demo", "--buyers", "some"], "--buyers"),
    "demo: no SKUs": (["demo", "--skus", "0"], "--skus"),
    "demo: too many SKUs": (["demo", "--skus", "201"], "--skus"),
    "demo: no units": (["demo", "--units", "0"], "--units"),
    "demo: too many units": (["demo", "--units", "1001"], "--units"),
    "demo: a seed in words": (["demo", "--seed", "luck"], "--seed"),
    "demo: an unknown option": (["demo", "--fast"], "--fast"),
    "version: an argument": (["version", "2"], "2"),
}


@pytest.mark.parametrize(("arguments", "says"), MISUSES.values(), ids=MISUSES)
def test_a_command_called_wrongly_says_which_option(holdfast: Holdfast, arguments: Sequence[str], says: str) -> None:
    misused(holdfast(*arguments, **SIGNED), says)


# --- Variables --------------------------------------------------------------------------------------------------------

VARIABLES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "unknown": ("HOLDFAST_XYZZY__Q", "1", ("variable HOLDFAST_XYZZY__Q is unknown",)),
    "misspelt": (
        *("HOLDFAST_DATABASE__POOLSIZE", "8"),
        ("HOLDFAST_DATABASE__POOLSIZE is unknown", "did you mean HOLDFAST_DATABASE__POOL_SIZE?"),
    ),
    "a misspelt secret": (
        *("HOLDFAST_HTTP__TOKEN_SECRTE", SECRET),
        ("HOLDFAST_HTTP__TOKEN_SECRTE is unknown", "did you mean HOLDFAST_HTTP__TOKEN_SECRET?"),
    ),
    "one underscore": (
        *("HOLDFAST_DATABASE_URL", f"postgresql://shop:{PASSWORD}@127.0.0.1/shop"),
        ("HOLDFAST_DATABASE_URL is unknown", "did you mean HOLDFAST_DATABASE__URL?"),
    ),
    "a section alone": ("HOLDFAST_HTTP", "127.0.0.1", ("variable HOLDFAST_HTTP is unknown",)),
    "a word for a number": ("HOLDFAST_DATABASE__POOL_SIZE", "many", ("HOLDFAST_DATABASE__POOL_SIZE", "int")),
    "nothing for a number": ("HOLDFAST_DATABASE__POOL_SIZE", "", ("HOLDFAST_DATABASE__POOL_SIZE", "int")),
    "a broken number": ("HOLDFAST_DATABASE__POOL_SIZE", "1.5", ("HOLDFAST_DATABASE__POOL_SIZE", "int")),
    "no number": ("HOLDFAST_DATABASE__POOL_SIZE", "NaN", ("HOLDFAST_DATABASE__POOL_SIZE", "int")),
    "below the range": ("HOLDFAST_DATABASE__POOL_SIZE", "0", ("HOLDFAST_DATABASE__POOL_SIZE", ">= 1")),
    "above the range": ("HOLDFAST_DATABASE__READERS", "65", ("HOLDFAST_DATABASE__READERS", "<= 64")),
    "far above the range": ("HOLDFAST_ORDERS__TIME_OUT_MS", "9" * 30, ("HOLDFAST_ORDERS__TIME_OUT_MS",)),
    "a port beyond the last": ("HOLDFAST_HTTP__PORT", "65536", ("HOLDFAST_HTTP__PORT", "<= 65535")),
    "a port below zero": ("HOLDFAST_HTTP__PORT", "-1", ("HOLDFAST_HTTP__PORT", ">= 0")),
    "a switch half on": ("HOLDFAST_PAYMENTS__SANDBOX", "maybe", ("HOLDFAST_PAYMENTS__SANDBOX", "bool")),
    "an unknown word": ("HOLDFAST_LOG__LEVEL", "loud", ("HOLDFAST_LOG__LEVEL", "loud")),
}


@pytest.mark.parametrize(("command", "name", "value", "says"), **spread(VARIABLES, "misspelt", "below the range"))
def test_a_bad_variable_is_refused_by_name(
    holdfast: Holdfast, command: Sequence[str], name: str, value: str, says: Sequence[str]
) -> None:
    cannot(holdfast(*command, **{**SIGNED, name: value}), *says)


# --- The file ---------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "no TOML": (b"[database\n", ("is not valid TOML", "line 1")),
    "a secret without an end": (f"[http]\ntoken_secret = '{SECRET}\n", ("is not valid TOML",)),
    "not UTF-8": (b"[log]\nlevel = '\xff'\n", ("is not valid TOML",)),
    "NUL": (b"[log]\n\0\n", ("is not valid TOML",)),
    "UTF-16": ("[log]\n".encode("utf-16"), ("is not valid TOML",)),
    "a section twice": ("[log]\n[log]\n", ("is not valid TOML",)),
    "an unknown section": ("[databse]\nurl = 'x'\n", ("section [databse] is unknown", "did you mean database?")),
    "a section like nothing": ("[xyzzy]\na = 1\n", ("section [xyzzy] is unknown", "known: ", "database")),
    "an unknown key": ("[database]\npool_sise = 1\n", ("[database] pool_sise is unknown", "did you mean pool_size?")),
    "a key like nothing": ("[log]\nxyzzy = 1\n", ("[log] xyzzy is unknown", "known: format, level")),
    "a misspelt secret": (f"[http]\ntoken_secrte = '{SECRET}'\n", ("token_secrte is unknown",)),
    "a key outside": ("pool_size = 1\n", ("'pool_size' stands outside a section", "[database]")),
    "sections in a list": ("[[database]]\nurl = 'x'\n", ("'database'",)),
    "a wrong type": ("[database]\npool_size = [1]\n", ("[database] pool_size", "Expected `int`")),
    "a switch for a number": ("[database]\npool_size = true\n", ("[database] pool_size", "Expected `int`")),
    "a date": ("[database]\nurl = 2026-01-31\n", ("[database] url", "Expected `str`")),
    "out of range": ("[http]\nport = 70000\n", ("[http] port = 70000", "<= 65535")),
    "a huge number": (f"[http]\nport = {'9' * 30}\n", ("[http] port",)),
    "infinity": ("[http]\nport = inf\n", ("[http] port",)),
    "a secret of the wrong type": (f"[http]\ntoken_secret = ['{SECRET}']\n", ("[http] token_secret = ***",)),
    "a secret in a table": (f"[http.token_secret]\nvalue = '{SECRET}'\n", ("[http] token_secret = ***",)),
    "a URL of the wrong type": (f"[database]\nurl = ['postgresql://shop:{PASSWORD}@db/shop']\n", ("[database] url",)),
}


@pytest.mark.parametrize(("command", "content", "says"), **spread(FILES, "no TOML", "an unknown key"))
def test_a_bad_file_is_refused_with_its_place(
    holdfast: Holdfast, tmp_path: Path, command: Sequence[str], content: str | bytes, says: Sequence[str]
) -> None:
    path = config(tmp_path, content)
    cannot(holdfast(*command, HOLDFAST_CONFIG=path), "holdfast.toml", *says)


@on_each_command
def test_a_file_that_cannot_be_read_is_named(holdfast: Holdfast, tmp_path: Path, command: Sequence[str]) -> None:
    cannot(holdfast(*command, HOLDFAST_CONFIG=f"{tmp_path}/nowhere.toml"), "HOLDFAST_CONFIG", "nowhere.toml")
    cannot(holdfast(*command, HOLDFAST_CONFIG=str(tmp_path)), "HOLDFAST_CONFIG", str(tmp_path))
    cannot(holdfast(*command, HOLDFAST_CONFIG=f"{tmp_path}/{'x' * 300}.toml"), "HOLDFAST_CONFIG")


# --- The database -----------------------------------------------------------------------------------------------------

ON_DATABASES = {name: call for name, call in COMMANDS.items() if name != "token"}
on_each_database_command = pytest.mark.parametrize("command", ON_DATABASES.values(), ids=ON_DATABASES)

NO_URLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("", ("HOLDFAST_DATABASE", "sqlite:///")),
    "a word": ("nonsense", ("HOLDFAST_DATABASE", "sqlite:///")),
    "a path": ("/var/lib/holdfast.db", ("HOLDFAST_DATABASE", "sqlite:///")),
    "a secret": (PASSWORD, ("HOLDFAST_DATABASE", "sqlite:///")),
    "MySQL": (f"mysql://shop:{PASSWORD}@127.0.0.1/shop", ("HOLDFAST_DATABASE", "mysql", "postgresql://")),
    "a database nobody knows": (f"xyzzy://shop:{PASSWORD}@127.0.0.1/shop", ("HOLDFAST_DATABASE", "xyzzy")),
    "HTTP": (f"https://shop:{PASSWORD}@127.0.0.1/shop", ("HOLDFAST_DATABASE", "https")),
    "a port in words": (f"postgresql://shop:{PASSWORD}@127.0.0.1:port/shop", ("HOLDFAST_DATABASE",)),
    "a port beyond the last": (f"postgresql://shop:{PASSWORD}@127.0.0.1:99999/shop", ("HOLDFAST_DATABASE",)),
    "an unknown option": (f"postgresql://shop:{PASSWORD}@127.0.0.1:1/shop?xyzzy=1", ("HOLDFAST_DATABASE", "xyzzy")),
    "another driver": (f"postgresql+xyzzy://shop:{PASSWORD}@127.0.0.1:1/shop", ("HOLDFAST_DATABASE",)),
}


@on_each_database_command
@pytest.mark.parametrize(("url", "says"), NO_URLS.values(), ids=NO_URLS)
def test_what_is_no_url_of_a_database_is_refused(
    holdfast: Holdfast, command: Sequence[str], url: str, says: Sequence[str]
) -> None:
    cannot(holdfast(*command, **SIGNED, HOLDFAST_DATABASE=url), *says)


@on_each_database_command
def test_a_folder_that_is_not_there_is_named(holdfast: Holdfast, tmp_path: Path, command: Sequence[str]) -> None:
    ended = holdfast(*command, **SIGNED, HOLDFAST_DATABASE=f"sqlite:///{tmp_path}/nowhere/holdfast.db")
    cannot(ended, "database", f"{tmp_path}/nowhere")


@on_each_database_command
def test_a_folder_is_no_database(holdfast: Holdfast, tmp_path: Path, command: Sequence[str]) -> None:
    ended = holdfast(*command, **SIGNED, HOLDFAST_DATABASE=f"sqlite:///{tmp_path}")
    cannot(ended, "database", str(tmp_path), "folder")


@on_each_database_command
def test_a_file_below_a_file_is_no_database(holdfast: Holdfast, tmp_path: Path, command: Sequence[str]) -> None:
    (tmp_path / "file").write_text("a file")
    ended = holdfast(*command, **SIGNED, HOLDFAST_DATABASE=f"sqlite:///{tmp_path}/file/holdfast.db")
    cannot(ended, "database", f"{tmp_path}/file")


@on_each_database_command
@pytest.mark.parametrize("content", [b"This is a letter. " * 100, b"SQLite format 3\0" + b"\xff" * 4_096])
def test_a_file_that_is_something_else_is_refused_and_kept(
    holdfast: Holdfast, tmp_path: Path, command: Sequence[str], content: bytes
) -> None:
    path = tmp_path / "letter.db"
    path.write_bytes(content)
    ended = holdfast(*command, **SIGNED, HOLDFAST_DATABASE=f"sqlite:///{path}")
    cannot(ended._replace(created=[each for each in ended.created if each != "letter.db.lock"]), "letter.db")
    assert path.read_bytes() == content


@on_each_database_command
def test_a_name_that_is_too_long_for_a_file_is_refused(
    holdfast: Holdfast, tmp_path: Path, command: Sequence[str]
) -> None:
    cannot(holdfast(*command, **SIGNED, HOLDFAST_DATABASE=f"sqlite:///{tmp_path}/{'x' * 300}.db"), "database")


@on_each_database_command
def test_a_name_that_no_file_can_have_is_refused(holdfast: Holdfast, tmp_path: Path, command: Sequence[str]) -> None:
    path = config(tmp_path, '[database]\nurl = "sqlite:///a\\u0000b.db"\n')
    cannot(holdfast(*command, **SIGNED, HOLDFAST_CONFIG=path), "database")


@pytest.mark.parametrize("command", [("serve",), ("work",), ("verify",)], ids=["serve", "work", "verify"])
def test_a_database_that_was_never_migrated_is_not_created_by_serving_it(
    holdfast: Holdfast, command: Sequence[str]
) -> None:
    cannot(holdfast(*command, **SIGNED), "holdfast migrate")


@pytest.mark.parametrize("command", [("serve",), ("work",), ("migrate",)], ids=["serve", "work", "migrate"])
def test_a_database_that_another_process_writes_is_refused(
    holdfast: Holdfast, migrated: str, command: Sequence[str]
) -> None:
    with open(f"{migrated.removeprefix('sqlite:///')}.lock", "a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        cannot(holdfast(*command, **SIGNED, HOLDFAST_DATABASE=migrated), "writes", "PostgreSQL")


@on_each_database_command
def test_a_postgresql_that_is_not_there_is_named_without_its_password(
    holdfast: Holdfast, command: Sequence[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        url = f"postgresql://shop:{PASSWORD}@127.0.0.1:{nobody.getsockname()[1]}/shop"
        cannot(holdfast(*command, **SIGNED, HOLDFAST_DATABASE=url), "HOLDFAST_DATABASE", "cannot be reached")


@on_each_database_command
@pytest.mark.parametrize("wrong", ["database", "user"])
def test_a_postgresql_that_does_not_let_us_in_says_why(
    holdfast: Holdfast, postgres_session: PostgresSession, command: Sequence[str], wrong: str
) -> None:
    require_postgres()
    user, name = ("nobody", "postgres") if wrong == "user" else ("postgres", "nowhere")
    url = f"postgresql://{user}:{PASSWORD}@127.0.0.1:{postgres_session.server.port}/{name}"
    cannot(
        holdfast(*command, **SIGNED, HOLDFAST_DATABASE=url),
        "HOLDFAST_DATABASE",
        "nobody" if wrong == "user" else "nowhere",
    )


def test_a_postgresql_that_was_never_migrated_is_told_to_be(
    holdfast: Holdfast, postgres_session: PostgresSession
) -> None:
    require_postgres()
    name = postgres_session.server.create_database()
    for command in ("serve", "work", "verify"):
        ended = holdfast(command, **SIGNED, HOLDFAST_DATABASE=postgres_session.server.url(name))
        cannot(ended, "holdfast migrate")
    postgres_session.server.drop_database(name)


# --- Secrets ----------------------------------------------------------------------------------------------------------

NO_TOKEN_SECRETS = {"none": "", "short": "short-but-secret", "one byte short": "x" * 31, "no text": "\udcff" * 40}


@pytest.mark.usefixtures("_everything_is_closed")
@pytest.mark.parametrize("secret", NO_TOKEN_SECRETS.values(), ids=NO_TOKEN_SECRETS)
@pytest.mark.parametrize("command", [("serve",), ("token", "ann")], ids=["serve", "token"])
def test_without_a_good_token_secret_nothing_is_signed(
    holdfast: Holdfast, migrated: str, command: Sequence[str], secret: str
) -> None:
    environ = {**SIGNED, "HOLDFAST_DATABASE": migrated, "HOLDFAST_HTTP__TOKEN_SECRET": secret}
    ended = holdfast(*command, **environ)
    cannot(ended, "HOLDFAST_HTTP__TOKEN_SECRET", "32")
    assert not secret or secret not in ended.err


NO_PROVIDERS = {
    "no provider": ({"HOLDFAST_PAYMENTS__SANDBOX": "false"}, ("HOLDFAST_PAYMENTS__SANDBOX",)),
    "no secret": ({"HOLDFAST_PAYMENTS__SANDBOX_SECRET": ""}, ("HOLDFAST_PAYMENTS__SANDBOX_SECRET", "16")),
    "a short secret": ({"HOLDFAST_PAYMENTS__SANDBOX_SECRET": "x" * 15}, ("HOLDFAST_PAYMENTS__SANDBOX_SECRET", "16")),
    "a secret that is no text": (
        {"HOLDFAST_PAYMENTS__SANDBOX_SECRET": "\udcff" * 40},
        ("HOLDFAST_PAYMENTS__SANDBOX_SECRET",),
    ),
}


@pytest.mark.parametrize(("changed", "says"), NO_PROVIDERS.values(), ids=NO_PROVIDERS)
@pytest.mark.parametrize("command", ["serve", "work"])
def test_without_a_payment_provider_nothing_is_sold(
    holdfast: Holdfast, migrated: str, command: str, changed: dict[str, str], says: Sequence[str]
) -> None:
    cannot(holdfast(command, **{**SIGNED, "HOLDFAST_DATABASE": migrated, **changed}), *says)


SUBJECTS = {
    "empty": "",
    "blank": " ",
    "a blank inside": "ann boss",
    "a newline behind": "ann\n",
    "a second line": "ann\nboss",
    "a tab": "ann\tboss",
    "an escape": "\x1b[31mann",
    "DEL": "ann\x7f",
    "beyond ASCII": "änn",
    "no text": "ann\udcff",
    "too long": "a" * 129,
}


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("staff", [(), ("--staff",)], ids=["buyer", "staff"])
def test_no_token_is_issued_for_a_subject_that_no_server_takes(
    holdfast: Holdfast, subject: str, staff: Sequence[str]
) -> None:
    cannot(holdfast("token", *staff, "--", subject, **SIGNED), "subject")


def test_the_longest_subject_gets_a_token_and_the_secret_stays_hidden(holdfast: Holdfast) -> None:
    ended = holdfast("token", "~" * 128, **SIGNED)
    assert (ended.code, ended.err, ended.created) == (0, "", [])
    assert ended.out.count(".") == 2
    secretive(ended)


# --- The address ------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        yield somebody.getsockname()[1]


@pytest.mark.usefixtures("_everything_is_closed")
def test_a_port_in_use_is_named_whichever_way_it_was_chosen(holdfast: Holdfast, migrated: str, taken: int) -> None:
    environ = {**SIGNED, "HOLDFAST_DATABASE": migrated}
    says = (f"127.0.0.1:{taken}", "HOLDFAST_HTTP__PORT")
    cannot(holdfast("serve", "--port", str(taken), **environ), *says)
    cannot(holdfast("serve", **{**environ, "HOLDFAST_HTTP__PORT": str(taken)}), *says)
    cannot(holdfast("serve", "--no-work", "--port", str(taken), **environ), *says)


@pytest.mark.usefixtures("_everything_is_closed")
@pytest.mark.parametrize(
    "host", ["192.0.2.1", "x" * 64, "." * 5, "a..b"], ids=["not ours", "too long", "dots", "a gap"]
)
def test_an_address_that_is_not_ours_is_named(holdfast: Holdfast, migrated: str, host: str) -> None:
    environ = {**SIGNED, "HOLDFAST_DATABASE": migrated}
    cannot(holdfast("serve", **{**environ, "HOLDFAST_HTTP__HOST": host}), host, "HOLDFAST_HTTP__HOST")


# --- In a process of its own ------------------------------------------------------------------------------------------

REAL = {
    "short secret": (["token", "ann"], {"HOLDFAST_HTTP__TOKEN_SECRET": PASSWORD}, "HOLDFAST_HTTP__TOKEN_SECRET"),
    "no buyers": (["demo", "--buyers", "0"], {}, "--buyers"),
}


def test_real_processes_end_the_same_way(tmp_path: Path) -> None:
    with ExitStack() as stack:
        running = []
        for name, (arguments, environ, says) in REAL.items():
            folder = tmp_path / name
            folder.mkdir()
            process = subprocess.Popen(
                [sys.executable, "-m", "holdfast", *arguments],
                env={**os.environ, **environ, "COLUMNS": "200", "TERM": "dumb"},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            running.append((folder, says, stack.enter_context(process)))
        for folder, says, process in running:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (2, ""), err
            assert says in err
            assert "Traceback" not in err
            secretive(Ended(2, out, err, []))
            assert list(folder.iterdir()) == []
