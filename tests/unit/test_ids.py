"""Ids: unique, growing, positive, whatever the wall clock does."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.clock import US_PER_MS, US_PER_S, ManualClock, SystemClock
from holdfast.ids import EPOCH_MS, ID_MAX, NODE_BITS, SEQUENCE_BITS, IdSource, SharedIdSource, created_ms
from tests.unit.given import steady

START_US = EPOCH_MS * US_PER_MS
LAST_US = START_US + (2**41 - 10_000) * US_PER_MS


@steady
@given(
    start_us=st.integers(0, LAST_US - 10 * US_PER_S),
    jumps=st.lists(st.floats(-1_000, 0.002, allow_nan=False), max_size=30),
    at_once=st.integers(1, 50),
)
def test_ids_grow_although_the_wall_clock_jumps(start_us: int, jumps: list[float], at_once: int) -> None:
    clock = ManualClock(start_us)
    source = IdSource(clock)
    ids = [source.next() for _ in range(at_once)]
    for jump in jumps:
        clock.jump_wall(jump)
        ids += [source.next() for _ in range(at_once)]
    assert all(earlier < later for earlier, later in pairwise(ids))
    assert all(0 < each <= ID_MAX for each in ids)


def test_more_ids_than_a_millisecond_holds_stay_unique_and_growing() -> None:
    source = IdSource(ManualClock(START_US + US_PER_S), node=7)
    ids = [source.next() for _ in range(3 * (1 << SEQUENCE_BITS))]
    assert ids == sorted(set(ids))


def test_ids_made_later_are_greater_across_sources() -> None:
    clock = ManualClock(START_US + US_PER_S)
    first = [IdSource(clock).next() for _ in range(20)]
    clock.advance(0.001)
    second = [IdSource(clock).next() for _ in range(20)]
    assert max(first) < min(second)


def test_an_id_carries_its_millisecond_and_its_node() -> None:
    clock = ManualClock(START_US + 5_000_999)
    value = IdSource(clock, node=513).next()
    assert value >> (SEQUENCE_BITS + NODE_BITS) == 5_000
    assert value & ((1 << NODE_BITS) - 1) == 513


def test_ids_last_until_2094() -> None:
    assert 0 < IdSource(ManualClock(LAST_US)).next() <= ID_MAX


@pytest.mark.parametrize("node", [-1, 1 << NODE_BITS])
def test_a_node_out_of_range_is_refused(node: int) -> None:
    with pytest.raises(ValueError, match=str(node)):
        IdSource(ManualClock(), node=node)


def test_message_ids_are_unique_although_node_and_instant_are_the_same() -> None:
    clock = ManualClock(START_US + US_PER_S)
    ids = [IdSource(clock, node=1).message_id() for _ in range(1_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in ids)


def test_a_shared_source_grows_within_a_millisecond_and_after_the_wall_clock_stepped_back() -> None:
    clock = ManualClock(START_US + 60 * US_PER_S)
    source = SharedIdSource(clock)
    ids = [source.next() for _ in range(5_000)]
    assert ids == sorted(set(ids))
    assert ids[0] >> (SEQUENCE_BITS + NODE_BITS) == 60_000
    clock.jump_wall(-10)
    assert source.next() > ids[-1]
    clock.advance(20)
    assert source.next() >> (SEQUENCE_BITS + NODE_BITS) == 70_000


def test_a_shared_source_serves_threads() -> None:
    source = SharedIdSource(SystemClock())
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda _: [source.next() for _ in range(5_000)], range(4)))
    assert all(ids == sorted(ids) for ids in given)
    assert len({each for ids in given for each in ids}) == 20_000


def test_an_id_tells_when_it_was_drawn() -> None:
    clock = ManualClock(1_800_000_000_123_456)
    assert created_ms(IdSource(clock).next()) == 1_800_000_000_123
    assert created_ms(SharedIdSource(clock).next()) == 1_800_000_000_123
