"""The pages tell the truth: settings, commands, checks, routes, codes, links, examples and public names."""

from __future__ import annotations

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

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


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
    renamed = {path.replace("{order_id}", "{id}").replace("{token}", "{link}") for path in paths}
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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "welcomed: ann@example.org" in done.stdout


def test_code_in_the_readme_stands_in_an_example() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = "".join(line.strip() for path in EXAMPLES for line in path.read_text(encoding="utf-8").splitlines())
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert "".join(line.strip() for line in block.splitlines()) in examples


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
