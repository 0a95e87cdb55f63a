"""Fingerprints: what groups failures together, and what must not split or join a group."""

from __future__ import annotations

import pytest

from holdfast.messaging.fingerprint import Fingerprint, fingerprint, group_key
from holdfast.messaging.recover import describe


def deep(levels: int, text: str) -> None:
    if levels:
        deep(levels - 1, text)
    raise ValueError(text)


def other(text: str) -> None:
    raise ValueError(text)


def caused(text: str) -> None:
    try:
        other("the cause")
    except ValueError as error:
        raise KeyError(text) from error


def reason_of(call: object, *arguments: object) -> str:
    """The reason that the listener would park with."""
    try:
        call(*arguments)  # type: ignore[operator]
    except Exception as error:
        return describe(error)
    raise AssertionError("it did not fail")


def test_an_exception_is_its_class_and_its_frames() -> None:
    seen = fingerprint(reason_of(other, "order 17 of ann"))
    assert seen.error == "ValueError"
    assert seen.frames == ("test_fingerprint.py:reason_of", "test_fingerprint.py:other")
    assert seen.text == ""


@pytest.mark.parametrize(
    "text",
    [
        "order 17 of ann",
        "",
        "two\nlines",
        "Sentence: with a colon",
        'a quoted frame\n  File "/srv/evil.py", line 3, in evil',
        'a quoted trace\nTraceback (most recent call last):\n  File "/srv/evil.py", line 3, in evil\nKeyError: 1',
        "Traceback (most recent call last):",
        "世界 🦔",
        "x" * 2_000,
    ],
)
def test_the_text_of_an_error_does_not_split_its_group(text: str) -> None:
    assert fingerprint(reason_of(other, text)) == fingerprint(reason_of(other, "plain"))


@pytest.mark.parametrize("chars", [2_900, 3_000, 5_000])
def test_a_traceback_that_was_cut_off_groups_by_the_class_alone(chars: int) -> None:
    assert fingerprint(reason_of(other, "x" * chars)) == Fingerprint("ValueError", (), "")


def test_line_numbers_and_folders_do_not_count() -> None:
    reason = reason_of(other, "no")
    moved = reason.replace(__file__, "/opt/app/test_fingerprint.py").replace("line ", "line 9")
    assert moved != reason
    assert fingerprint(moved) == fingerprint(reason)
    windows = reason.replace(__file__, "C:\\app\\test_fingerprint.py")
    assert fingerprint(windows) == fingerprint(reason)


def test_functions_files_and_classes_do_count() -> None:
    base = reason_of(other, "no")
    others = [
        reason_of(caused, "no"),
        base.replace("in other", "in another"),
        base.replace("test_fingerprint.py", "elsewhere.py"),
        base.replace("ValueError", "TypeError"),
    ]
    assert len({fingerprint(each) for each in [base, *others]}) == 5


def test_recursion_counts_once_however_deep() -> None:
    assert fingerprint(reason_of(deep, 5, "no")) == fingerprint(reason_of(deep, 50, "no"))


def test_of_a_chain_the_raised_exceptions_own_frames_count() -> None:
    seen = fingerprint(reason_of(caused, "no"))
    assert seen.error == "KeyError"
    assert seen.frames == ("test_fingerprint.py:reason_of", "test_fingerprint.py:caused")


def test_of_an_error_that_was_handed_on_the_cause_tells_the_place() -> None:
    """The group commit gives each caller an equal error of its own, with the one that was raised as its cause."""

    def hand_on() -> None:
        try:
            other("no")
        except ValueError as error:
            raise ValueError("no") from error

    assert fingerprint(reason_of(hand_on)).frames == ("test_fingerprint.py:hand_on", "test_fingerprint.py:other")


def test_an_exception_of_a_module_is_known_by_its_bare_class() -> None:
    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("no")

    reason = reason_of(fail)
    assert "<locals>.Local: no" in reason
    assert fingerprint(reason) == Fingerprint(
        "Local", ("test_fingerprint.py:reason_of", "test_fingerprint.py:fail"), ""
    )


def test_a_bare_traceback_is_read_too() -> None:
    bare = reason_of(other, "no").partition("\n")[2]
    assert bare.startswith("Traceback")
    assert fingerprint(bare) == fingerprint(reason_of(other, "no"))


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("there is no seat 17 in row 3", "there is no seat 5 in row 12"),
        ("unknown message type 'a.b'; known: x", "unknown message type 'c.d'; known: x"),
        ('no "blue" shoe', 'no "it\'s green" shoe'),
        ("object at 0x7f00aa12 is gone", "object at 0x7F99bb34 is gone"),
        (
            "no order 6f2c1f0e-9a63-4a51-9d8e-0a1b2c3d4e5f",
            "no order 00000000-0000-4000-8000-ffffffffffff",
        ),
        ("message 018f0a2b3c4d5e6f is odd", "message 99ffaa2b3c4d5e6f is odd"),
        ("late by 1.5 s", "late by 20 s"),
        ("first line\nanything", "first line\nelse"),
    ],
)
def test_a_bare_sentence_groups_without_its_values(one: str, same: str) -> None:
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one).error == ""


@pytest.mark.parametrize(
    ("one", "other_one"),
    [
        ("nobody can read this", "nobody can write this"),
        ("timeout: after 5 s", "refused: after 5 s"),
        ("unknown message type 'a'; known: x", "unknown message type 'a'; known: y"),
    ],
)
def test_other_words_are_another_group(one: str, other_one: str) -> None:
    assert fingerprint(one) != fingerprint(other_one)


@pytest.mark.parametrize("reason", ["", "\n", ":", "a:\n" * 500, "'" * 4_000, "\x00\ud800", "1" * 4_000, " \n" * 2_000])
def test_any_text_has_a_fingerprint_and_a_key(reason: str) -> None:
    key = group_key("a.queue", fingerprint(reason.replace("\ud800", "?")))
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")


def test_no_value_of_the_error_is_in_the_fingerprint() -> None:
    seen = fingerprint(reason_of(other, "card 4111-1111 of ann@example.org"))
    assert "4111" not in repr(seen)
    assert "ann" not in repr(seen)


def test_the_queue_is_part_of_the_key_and_the_key_is_stable() -> None:
    seen = Fingerprint("ValueError", ("a.py:f",), "")
    assert group_key("one", seen) != group_key("two", seen)
    assert group_key("one", seen) == group_key("one", Fingerprint("ValueError", ("a.py:f",), ""))
    assert group_key("one", Fingerprint("A", ("b", "c"), "")) != group_key("one", Fingerprint("A", ("b",), "c"))
