"""Settings: where they come from, what is refused and how, and that secrets stay secret."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from holdfast.errors import InvalidSettings
from holdfast.settings import Secret, Settings, load

HIDDEN = "correct-horse-battery"


def written(folder: Path, text: str) -> dict[str, str]:
    """The environment that names a file with this text."""
    path = folder / "holdfast.toml"
    path.write_text(text, encoding="utf-8")
    return {"HOLDFAST_CONFIG": str(path)}


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(InvalidSettings) as caught:
        load(environ)
    return caught.value.detail


def test_nothing_needs_to_be_set() -> None:
    assert load({}) == Settings()
    assert load({"PATH": "/bin", "HOLDFASTER": "yes"}) == Settings()
    assert Settings().database.url == "sqlite:///holdfast.db"


def test_the_file_is_read_and_what_it_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    settings = load(written(tmp_path, "[database]\npool_size = 3\n[log]\nformat = 'json'\n"))
    assert (settings.database.pool_size, settings.log.format) == (3, "json")
    assert settings.database.queue_max == Settings().database.queue_max


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environ = written(tmp_path, "[database]\npool_size = 3\nreaders = 2\n")
    settings = load({**environ, "HOLDFAST_DATABASE__POOL_SIZE": "8"})
    assert (settings.database.pool_size, settings.database.readers) == (8, 2)


def test_the_short_key_names_the_database() -> None:
    assert load({"HOLDFAST_DATABASE": "sqlite://"}).database.url == "sqlite://"


def test_the_long_key_wins_over_the_short_one(tmp_path: Path) -> None:
    environ = written(tmp_path, "[database]\nurl = 'sqlite:///file.db'\n")
    assert load({**environ, "HOLDFAST_DATABASE": "sqlite:///short.db"}).database.url == "sqlite:///short.db"
    both = {"HOLDFAST_DATABASE": "sqlite:///short.db", "HOLDFAST_DATABASE__URL": "sqlite:///long.db"}
    assert load({**environ, **both}).database.url == "sqlite:///long.db"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False)])
def test_a_switch_is_read_from_a_variable(text: str, value: bool) -> None:
    assert load({"HOLDFAST_PAYMENTS__SANDBOX": text}).payments.sandbox is value


def test_an_unknown_variable_is_refused_with_the_likely_one() -> None:
    detail = refusal({"HOLDFAST_DATABASE__POOLSIZE": "8"})
    assert "HOLDFAST_DATABASE__POOLSIZE is unknown" in detail
    assert "did you mean HOLDFAST_DATABASE__POOL_SIZE?" in detail


@pytest.mark.parametrize("name", ["HOLDFAST_", "HOLDFAST_HTTP", "HOLDFAST_XYZZY__Q", "HOLDFAST_database__url"])
def test_any_other_variable_under_the_prefix_is_refused_by_name(name: str) -> None:
    assert f"variable {name} is unknown" in refusal({name: "1"})


def test_an_unknown_section_is_refused_with_file_and_hint(tmp_path: Path) -> None:
    environ = written(tmp_path, "[databse]\nurl = 'sqlite://'\n")
    detail = refusal(environ)
    assert "[databse] is unknown; did you mean database?" in detail
    assert environ["HOLDFAST_CONFIG"] in detail


def test_an_unknown_key_is_refused_with_file_section_and_hint(tmp_path: Path) -> None:
    environ = written(tmp_path, "[database]\npool_sise = 1\n")
    assert refusal(environ) == f"{environ['HOLDFAST_CONFIG']}: [database] pool_sise is unknown; did you mean pool_size?"


def test_a_key_like_nothing_known_is_refused_with_all_that_is(tmp_path: Path) -> None:
    detail = refusal(written(tmp_path, "[log]\nxyzzy = 1\n"))
    assert "xyzzy is unknown; known: format, level" in detail


def test_a_key_outside_of_a_section_is_refused(tmp_path: Path) -> None:
    assert "'pool_size' stands outside a section" in refusal(written(tmp_path, "pool_size = 1\n"))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("HOLDFAST_DATABASE__POOL_SIZE", "many", "Expected `int`"),
        ("HOLDFAST_DATABASE__POOL_SIZE", "", "Expected `int`"),
        ("HOLDFAST_DATABASE__POOL_SIZE", "0", ">= 1"),
        ("HOLDFAST_HTTP__PORT", "65536", "<= 65535"),
        ("HOLDFAST_ORDERS__TIME_OUT_MS", "99", ">= 100"),
        ("HOLDFAST_LOG__FORMAT", "xml", "'xml'"),
        ("HOLDFAST_PAYMENTS__SANDBOX", "maybe", "Expected `bool`"),
    ],
)
def test_a_wrong_value_of_a_variable_is_refused_with_name_value_and_reason(name: str, value: str, why: str) -> None:
    detail = refusal({name: value})
    assert detail.startswith(f"{name} = {value!r} is wrong: ")
    assert why in detail


def test_a_wrong_value_in_the_file_is_refused_with_its_place(tmp_path: Path) -> None:
    environ = written(tmp_path, "[http]\nport = 70000\n")
    assert refusal(environ).startswith(f"{environ['HOLDFAST_CONFIG']}: [http] port = 70000 is wrong: ")
    assert "[http] port = [80] is wrong: Expected `int`" in refusal(written(tmp_path, "[http]\nport = [80]\n"))


def test_a_value_of_the_file_that_the_environment_replaces_is_not_judged(tmp_path: Path) -> None:
    environ = written(tmp_path, "[http]\nport = 70000\n")
    assert load({**environ, "HOLDFAST_HTTP__PORT": "80"}).http.port == 80


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    detail = refusal({"HOLDFAST_CONFIG": f"{tmp_path}/nowhere.toml"})
    assert "HOLDFAST_CONFIG: cannot read" in detail
    assert "nowhere.toml" in detail


@pytest.mark.parametrize("content", [b"[database\n", b"\xff\xfe", b"[log]\nlevel = \n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert f"{path} is not valid TOML" in refusal({"HOLDFAST_CONFIG": str(path)})


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret(HIDDEN)
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r}",
        f"{secret:>40}",
        "%s %r" % (secret, secret),  # noqa: UP031  # one more way to show it
        "{} {!r}".format(secret, secret),  # noqa: UP032  # and one more
        repr([secret]),
        repr({"key": secret}),
    ]
    assert [text for text in shown if HIDDEN in text] == []
    assert secret.reveal() == HIDDEN
    assert type(secret.reveal()) is str


def test_secrets_are_read_and_hidden_in_the_settings() -> None:
    settings = load({"HOLDFAST_HTTP__TOKEN_SECRET": HIDDEN, "HOLDFAST_PAYMENTS__SANDBOX_SECRET": HIDDEN})
    assert settings.http.token_secret.reveal() == HIDDEN
    assert settings.payments.sandbox_secret.reveal() == HIDDEN
    assert HIDDEN not in repr(settings)
    assert HIDDEN not in str(settings.http)
    assert HIDDEN not in repr(msgspec.structs.asdict(settings))


def test_the_password_in_the_databases_url_is_hidden_in_the_settings() -> None:
    settings = load({"HOLDFAST_DATABASE": f"postgresql://shop:{HIDDEN}@db.example/shop"})
    assert HIDDEN not in repr(settings)
    assert HIDDEN not in repr(settings.database)


def test_a_wrong_secret_is_refused_without_showing_it(tmp_path: Path) -> None:
    detail = refusal(written(tmp_path, f"[http]\ntoken_secret = ['{HIDDEN}']\n"))
    assert "[http] token_secret = *** is wrong" in detail
    assert HIDDEN not in detail


def test_a_misspelt_secret_is_refused_without_showing_it(tmp_path: Path) -> None:
    assert HIDDEN not in refusal({"HOLDFAST_HTTP__TOKEN_SECRTE": HIDDEN})
    assert HIDDEN not in refusal(written(tmp_path, f"[http]\ntoken_secrte = '{HIDDEN}'\n"))
    assert HIDDEN not in refusal(written(tmp_path, f"[http]\ntoken_secret = '{HIDDEN}\n"))


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        Settings().database.url = "sqlite://"  # type: ignore[misc]  # the case itself
