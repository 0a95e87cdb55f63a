"""RetryPolicy: how often and after how long."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from holdfast.errors import CannotDecode, Conflict, InvalidInput, Refused, Unavailable
from holdfast.messaging.retry import Reject, Retry, RetryPolicy, is_fatal
from tests.unit.given import steady

POLICIES = st.builds(
    RetryPolicy,
    tries=st.integers(1, 2_000),
    interval_ms=st.integers(0, 86_400_000),
    multiplier=st.floats(1, 10),
    interval_ms_max=st.integers(0, 366 * 86_400_000),
    jitter=st.floats(0, 1),
)
ATTEMPTS = st.integers(1, 2_100)
BOOM = RuntimeError("boom")


@steady
@given(policy=POLICIES, attempt=ATTEMPTS, seed=st.integers())
def test_a_wait_is_never_negative_and_never_above_the_maximum(policy: RetryPolicy, attempt: int, seed: int) -> None:
    wait = policy.delay_ms(attempt, BOOM, random.Random(seed))
    assert (wait is None) == (attempt >= policy.tries)
    if wait is not None:
        assert 0 <= wait <= policy.interval_ms_max


@steady
@given(policy=POLICIES, attempt=ATTEMPTS, seed=st.integers())
def test_the_same_chance_gives_the_same_wait(policy: RetryPolicy, attempt: int, seed: int) -> None:
    assume(attempt * policy.multiplier < 300)
    assert policy.delay_ms(attempt, BOOM, random.Random(seed)) == policy.delay_ms(attempt, BOOM, random.Random(seed))


@steady
@given(tries=st.integers(1, 200), multiplier=st.floats(1, 3), interval_ms=st.integers(0, 10_000))
def test_waits_without_jitter_never_shrink(tries: int, multiplier: float, interval_ms: int) -> None:
    policy = RetryPolicy(tries=tries, interval_ms=interval_ms, multiplier=multiplier)
    waits = [policy.delay_ms(attempt, BOOM, random.Random(0)) for attempt in range(1, tries)]
    assert None not in waits
    assert waits == sorted(wait for wait in waits if wait is not None)


@steady
@given(jitter=st.floats(0, 1), interval_ms=st.integers(0, 100_000), seed=st.integers())
def test_jitter_takes_at_most_its_share(jitter: float, interval_ms: int, seed: int) -> None:
    wait = RetryPolicy(interval_ms=interval_ms, jitter=jitter).delay_ms(1, BOOM, random.Random(seed))
    assert wait is not None
    assert round(interval_ms * (1 - jitter)) <= wait <= interval_ms


@steady
@given(tries=st.integers(1, 50))
def test_there_are_exactly_so_many_tries(tries: int) -> None:
    policy = RetryPolicy(tries=tries)
    attempt = 1
    while policy.delay_ms(attempt, BOOM, random.Random(0)) is not None:
        attempt += 1
    assert attempt == tries


def test_the_documented_waits() -> None:
    policy = RetryPolicy(tries=6, interval_ms=5_000, multiplier=2.0, interval_ms_max=30_000)
    waits = [policy.delay_ms(attempt, BOOM, random.Random(0)) for attempt in range(1, 7)]
    assert waits == [5_000, 10_000, 20_000, 30_000, 30_000, None]


@pytest.mark.parametrize("error", [CannotDecode("x"), InvalidInput("x"), Reject("x")])
def test_what_cannot_be_mended_is_given_up_at_once(error: Exception) -> None:
    assert is_fatal(error)
    assert RetryPolicy(tries=10).delay_ms(1, error, random.Random(0)) is None


@pytest.mark.parametrize("error", [BOOM, Conflict("x"), Unavailable("x"), Refused("x"), Retry(1), TimeoutError()])
def test_anything_else_is_tried_again(error: Exception) -> None:
    assert not is_fatal(error)
    assert RetryPolicy(tries=10).delay_ms(1, error, random.Random(0)) is not None


@pytest.mark.parametrize(
    "wrong", [{"tries": 0}, {"interval_ms": -1}, {"interval_ms_max": -1}, {"jitter": 1.5}, {"jitter": -0.1}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        RetryPolicy(**wrong)  # type: ignore[arg-type]  # one field of either type


def test_the_handlers_signal_carries_its_wait() -> None:
    assert (Retry(250).after_ms, Retry(250).retryable) == (250, True)
    assert Retry(250, "not yet").detail == "not yet"
