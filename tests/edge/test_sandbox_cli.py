"""`holdfast sandbox-provider` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

WAIT_S = 20
NOTIFY = "http://127.0.0.1:9/v1/notices/sandbox"
SECRET = "a-secret-of-this-test"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "holdfast", "sandbox-provider", "--port", "0", *arguments]


def test_it_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    book = f"sqlite:///{tmp_path}/book.db"
    arguments = command("--notify-url", NOTIFY, "--secret", SECRET, "--merchant", "me", "--book", book)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("the sandbox provider listens on http://127.0.0.1:"), said
            url = said.split()[-1]
            answer = httpx.post(f"{url}/control/faults", json={"noticeCopies": 2}, trust_env=False, timeout=WAIT_S)
            assert answer.json()["noticeCopies"] == 2
            assert httpx.get(f"{url}/pay/no.link", trust_env=False, timeout=WAIT_S).status_code == 400
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
    assert (tmp_path / "book.db").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--notify-url", NOTIFY, "--secret", "short"], "at least 16 characters"),
        (["--notify-url", NOTIFY], "at least 16 characters"),
        (["--notify-url", "nowhere", "--secret", SECRET], "is no address"),
        (["--notify-url", "ftp://there/", "--secret", SECRET], "is no address"),
        (["--notify-url", NOTIFY, "--secret", SECRET, "--book", "mysql://x/y"], "mysql is not supported"),
        (
            ["--notify-url", NOTIFY, "--secret", SECRET, "--host", "no.such.host.invalid"],
            "is no address of this machine",
        ),
    ],
)
def test_what_will_not_do_is_said_in_one_sentence(arguments: list[str], says: str) -> None:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=WAIT_S, check=False, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
