"""The pages tell the truth: settings, commands, checks, routes, codes, links, examples and public names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

import holdfast
from holdfast.audit import CHECKS
from holdfast.edge.cli import app
from holdfast.edge.http import health, orders, payments, stock
from holdfast.edge.http.problems import STATUS
from holdfast.errors import HoldfastError
from holdfast.settings import Secret, Settings
from tests.contract.backends import BACKENDS, PostgresSession
from tests.servers.postgres import require_postgres

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
TOLD = {  # what each example prints, as far as it is the story
    "batch_with_outcomes.py": {"one call for 10 products", "kept for a human: Reject: sku-7 has no price"},
    "broadcast.py": {"instance 1 forgets TICKET", "instance 2 forgets TICKET", "one of them reports TICKET"},
    "coming_from_celery.py": {
        "three days later: ben@example.org: please confirm",
        "digests of a week: [1, 2, 3, 4, 5, 6, 7]",
    },
    "coming_from_faststream.py": {"label of order 7"},
    "dead_letters.py": {"FREE-BEER: rejected in coupons", "SUMMER: expired in coupons"},
    "delay_and_cancel.py": {
        "waiting: close:order 1, close:order 2",
        "order 1: paid, 1 time-out taken back",
        "order 2: 1 time-out moved",
        "order 1 paid, order 2 closed and 0 messages wait",
    },
    "effect_once.py": {"waiting: 2 copies of one message", "balance: 500, notices: 1"},
    "hello.py": {"handled: Ann"},
    "order_by_key.py": {"order B: placed, paid, sent", "orders at work at once: 3"},
    "outbox_in_your_transaction.py": {"rolled back: no row, and no message", "welcomed: ann@example.org"},
    "outbox_with_sqlalchemy.py": {"rolled back: no row, and no message", "welcomed: ann@example.org"},
    "quickstart.py": {"members: 0"},
    "request_and_reply.py": {"TICKET costs 9900", "asked while nobody answers: no reply within 0.2 s", "left: 0"},
    "retries_and_the_error_store.py": {
        "attempt 2: sent to ann@example.org",
        "kept: Reject: 'ben at example.org' is no address",
        "after the edit: ben@example.org",
    },
    "testing_your_handlers.py": {"welcomed: ann@example.org"},
    "versions_of_a_message.py": {"welcomed: ann@example.org in 'en', sent as welcome.v1"},
}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def subclasses(kind: type[HoldfastError]) -> set[type[HoldfastError]]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


def test_every_setting_stands_on_its_page_with_its_default() -> None:
    wanted = []
    for section in msgspec.structs.fields(Settings):
        for field in msgspec.structs.fields(section.type):
            default = "" if isinstance(field.default, Secret) else f"`{field.default}`"
            wanted.append(f"| `HOLDFAST_{section.name.upper()}__{field.name.upper()}` | {default} |")
    text = page("configuration.md")
    assert [line for line in wanted if line not in text] == []
    assert text.count("| `HOLDFAST_") == len(wanted)


def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, by its whole name."""
    for each, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {each}")
        else:
            yield f"{name} {each}", command


def test_every_command_and_option_stands_on_its_page() -> None:
    text = page("operations.md")
    missing = []
    for name, command in commands(typer.main.get_command(app), "holdfast"):
        names = [name, *(option for each in command.params for option in each.opts if option.startswith("--"))]
        missing += [each for each in names if each not in text and each not in ("--work", "--as-json", "--help")]
    assert missing == []


def test_every_check_of_the_audit_stands_on_its_page() -> None:
    named = set(re.findall(r"`((?:stock|orders|money|messages)\.\w+)`", page("guarantees.md")))
    assert named == {check.name for check in CHECKS}


def test_every_route_stands_on_its_page() -> None:
    text = page("http.md")
    paths = {orders.PLACE_PATH, "/v1/notices/sandbox"}
    for router in (orders.router(), stock.router(), payments.router(), health.router()):
        for route in router.routes:
            paths.add(re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path))
    renamed = {
        re.sub(r"{(order_id|payment_id|biz_order_no)}", "{id}", path).replace("{token}", "{link}") for path in paths
    }
    assert [path for path in sorted(renamed) if path not in text] == []


def test_every_code_of_a_refusal_stands_on_its_page_with_its_status() -> None:
    rows = dict(re.findall(r"^\| (\d{3}) \| (.*) \|$", page("http.md"), flags=re.MULTILINE))
    roots = tuple(kind for kind, _ in STATUS)
    missing = []
    for kind in subclasses(HoldfastError):
        if kind.__module__.startswith("tests") or not issubclass(kind, roots) or kind.code in NOT_OVER_HTTP:
            continue
        status = next(status for root, status in STATUS if issubclass(kind, root))
        if f"`{kind.code}`" not in rows.get(str(status), ""):
            missing.append((status, kind.code))
    assert missing == []


NOT_OVER_HTTP = {"refused", "invalid_settings", "cannot_decode", "no_such_queue", "reply_timeout"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_example_is_executed() -> None:
    assert {path.name for path in EXAMPLES} == set(TOLD)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_headings_lead_to_one(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if link[1] not in anchors(path.parent / link[0] if link[0] else path)] == []


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links, as code hosts do it."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    assert run_example(path, tmp_path) == TOLD[path.name]


# What takes no URL: it runs in memory, or where the environment says.
WITHOUT_URL = {"hello.py", "testing_your_handlers.py", "coming_from_celery.py", "quickstart.py"}


@pytest.mark.parametrize("name", sorted(set(TOLD) - WITHOUT_URL))
def test_examples_run_on_postgresql(name: str, tmp_path: Path, postgres_session: PostgresSession) -> None:
    require_postgres()
    with BACKENDS["postgresql"](tmp_path, postgres_session) as url:
        assert run_example(ROOT / "examples" / name, tmp_path, url) == TOLD[name]


def run_example(path: Path, folder: Path, *arguments: str) -> set[str]:
    """Run an example in `folder`, where only what the bare install has can be imported (and the driver of a URL).

    Answers the lines of `TOLD` that it printed.
    """
    extras = EXTRAS if not arguments else [each for each in EXTRAS if each != "asyncpg"]
    bare = BARE.format(extras=extras)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", bare, path, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return {line for line in TOLD[path.name] if line in done.stdout}


EXTRAS = [
    "asyncpg",
    "cryptography",
    "httptools",
    "httpx",
    "jwt",
    "litestar",
    "uvicorn",
    "uvloop",
    "zstandard",
    "psycopg",
]

BARE = """
import runpy, sys
from importlib.abc import MetaPathFinder


class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras}:
            raise ModuleNotFoundError(f"No module named {{name!r}} in the bare install", name=name)


sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_commands_of_the_quickstart_do_what_it_says(database_url: str, tmp_path: Path) -> None:
    text, _, _ = page("quickstart.md").partition("## On PostgreSQL")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    commands = re.findall(r"^\$ (.*)$", "".join(blocks), flags=re.MULTILINE)
    assert commands[:3] == ["python3 -m venv .venv", ". .venv/bin/activate", "pip install ."]  # the test has that
    chosen = "export HOLDFAST_DATABASE=sqlite:///club.db"
    assert chosen in commands
    commands = [f"export HOLDFAST_DATABASE={database_url}" if each == chosen else each for each in commands[3:]]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "set -eu\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    for line in ("handled: Ann", "welcomed: ann@example.org", "replayed 1 message", "welcomed: ben@example.org"):
        assert line in done.stdout
    assert done.stdout.count("members: 2") == 2
    last = done.stdout.splitlines()[-1].split()
    assert last[1:3] == ["done", "members.welcome"]


def test_hello_is_short() -> None:
    assert len((ROOT / "examples/hello.py").read_text(encoding="utf-8").splitlines()) < 30


def squeezed(text: str) -> str:
    return "".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/from-celery.md", "docs/from-faststream.md"])
def test_code_of_ours_on_the_first_pages_stands_in_an_example(name: str) -> None:
    examples = [squeezed(path.read_text(encoding="utf-8")) for path in EXAMPLES]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    ours = [block for block in blocks if not re.search(r"^from (celery|faststream)", block, flags=re.MULTILINE)]
    assert ours
    assert [block for block in ours if not any(squeezed(block) in example for example in examples)] == []


def test_public_names_are_sorted_and_pinned() -> None:
    names = holdfast.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert {name for name in names if getattr(holdfast, name, None) is None} == set()
    assert len(names) == 38, "the public surface changed: say so in CHANGELOG.md and change this number"


def test_the_changelog_has_an_unreleased_section_and_the_help_lists_every_job() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert [job for job in phony.split() if not re.search(rf"^{job}:.*## ", makefile, flags=re.MULTILINE)] == []
