"""An operator's terminal: commands run as they would alone, on a database of notes."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple, TypeVar

import pytest

from holdfast.bootstrap import System
from holdfast.edge.cli import main
from holdfast.settings import Settings
from tests.contract.notes import opened

T = TypeVar("T")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Desk:
    """An operator's terminal beside a database of notes; each command runs as it would alone."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = settings
        self._patch = monkeypatch
        monkeypatch.setenv("HOLDFAST_DATABASE", settings.database.url)
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setenv("TERM", "dumb")

    def run(self, command: str, *arguments: object, stdin: bytes = b"") -> Ended:
        """A command, with its arguments and what it reads."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        self._patch.setattr(sys, "argv", ["holdfast", command, *map(str, arguments)])
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        out.flush()
        return Ended(code, out.buffer.getvalue().decode(), err.getvalue())

    def within(self, work: Callable[[System], Awaitable[T]]) -> T:
        """Work in a system of its own, which is gone when the next command comes."""

        async def run() -> T:
            async with opened(self.settings) as system:
                return await work(system)

        return asyncio.run(run())


def ok(ended: Ended) -> Ended:
    assert (ended.code, ended.err) == (0, "")
    return ended


def refused(ended: Ended, *says: str) -> None:
    """One sentence, status 2, nothing else."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("\n") == 1, ended
    assert len(ended.err) < 500
    for each in says:
        assert each in ended.err, ended


def misused(ended: Ended, *says: str) -> None:
    assert (ended.code, ended.out) == (2, ""), ended
    assert "Traceback" not in ended.err
    for each in says:
        assert each in ended.err, ended
