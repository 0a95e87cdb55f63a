"""Fingerprint: what failures of one cause have in common, read from the reason a message was parked with.

Two shapes of reason come here. One begins with `Type: text` and goes on with a traceback; of it only the type and the
frames count (file name without folder, function), so neither line numbers nor values split a group. The other is a bare
sentence; of it the words count, without numbers and quoted values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256

import msgspec

TEXT_CHARS_MAX = 200

_TYPE = re.compile(r"([^\W\d]\w*)(?::|$)")
_TRACE = "Traceback (most recent call last):"
_FRAME = re.compile(r'[ |]*File "(?:[^"\n]*[/\\])?([^"/\\\n]+)", line \d+, in (.+)')
_VALUES = re.compile(
    r"""'[^']*' | "[^"]*"                               # quoted
        | \b0[xX][0-9a-fA-F]+                           # addresses
        | \b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b
        | \b(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{16,}\b        # ids and hashes in hexadecimal
        | \d+(?:[.,:]\d+)*""",
    re.VERBOSE,
)


class Fingerprint(msgspec.Struct, frozen=True):
    """The exception's class with the frames of its traceback, or, without a traceback, the words of the reason."""

    error: str
    frames: tuple[str, ...]
    text: str


def fingerprint(reason: str) -> Fingerprint:
    """Read a reason. Pure; any text gives an answer, and no value of the error's own text is in it."""
    first, _, rest = reason.partition("\n")
    blocks = list(_blocks(reason.split("\n")))
    if first == _TRACE and blocks:  # a bare traceback, as a handler may give it: the last block is what was raised
        frames, ended_by = blocks[-1]
        return Fingerprint(_class_in(ended_by), frames, "")
    named = _TYPE.match(first)
    # A traceback ends with a newline; that much of it is left even when a long text has pushed out all the rest.
    if named and (blocks or _FRAME.search(rest) or (rest and rest.endswith("\n"))):
        error = named[1]
        # The error's text may quote other tracebacks: a block that ends in the line of this very class is its own.
        own = [block for block in blocks if _class_in(block[1]) == error]
        if len(own) > 1 and own[-2][1] == own[-1][1]:
            own.pop()  # handed on by the group commit as an equal error: its cause says where it comes from
        return Fingerprint(error, own[-1][0] if own else (), "")
    return Fingerprint("", (), _VALUES.sub("*", first)[:TEXT_CHARS_MAX].strip())


def group_key(queue: str, print_of: Fingerprint) -> str:
    """16 hexadecimal digits that name the group of a failure in a queue."""
    parts = (queue, print_of.error, *print_of.frames, print_of.text)
    return sha256(msgspec.json.encode(parts)).hexdigest()[:16]


def _blocks(lines: Sequence[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each whole traceback's frames, with the line that ends it; one whose head was cut off is left out."""
    frames: list[str] | None = None
    for line in lines:
        if line == _TRACE:
            frames = []
        elif frames is not None and (frame := _FRAME.fullmatch(line)):
            place = f"{frame[1]}:{frame[2]}"
            if frames[-1:] != [place]:  # recursion counts once, however deep
                frames.append(place)
        elif frames is not None and not line.startswith(" "):
            yield tuple(frames), line
            frames = None


def _class_in(line: str) -> str:
    """The bare class name at the head of `module.Class: text`."""
    return line.partition(":")[0].rpartition(".")[2].strip()
