"""The error root: what every error of ours can tell about itself."""

from __future__ import annotations

import copy
import pickle

import pytest

from holdfast import errors
from holdfast.errors import HoldfastError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HoldfastError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_without_detail_says_what_its_class_means(kind: type[HoldfastError]) -> None:
    error = kind()
    assert error.detail == str(error) == (kind.__doc__ or "").splitlines()[0]
    assert error.detail


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_its_detail_and_survives_a_copy(kind: type[HoldfastError]) -> None:
    error = kind("the cat sat on the key")
    for each in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(each) is kind
        assert each.detail == str(each) == "the cat sat on the key"


def test_an_error_of_a_user_needs_neither_docstring_nor_detail() -> None:
    class Nameless(HoldfastError):
        code = "nameless"

    assert isinstance(Nameless().detail, str)


def test_only_what_may_help_is_tried_again() -> None:
    assert {kind.code for kind in KINDS if kind.retryable} == {
        "conflict",
        "unavailable",
        "overloaded",
        "shutting_down",
        "outcome_unknown",
        "handler_timeout",
        "reply_timeout",
        "publish_rejected",
        "publish_unconfirmed",
    }
