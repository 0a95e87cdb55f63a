"""Routing against a reference that is written from RabbitMQ's rules alone: topics, and whole topologies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import NoSuchExchange
from holdfast.messaging.routing import topic_matches
from holdfast.messaging.topology import Exchange, Queue
from holdfast.messaging.transports.sql.routing import Known
from tests.routing_model import fits, reached
from tests.unit.given import steady

PAIRS = 100_000
SEED = 1


def random_key(random: random.Random, words: str) -> str:
    """Up to eight words, one of them now and then empty: `a..b`, `.a`, and the empty key."""
    length = random.randrange(9)
    return ".".join(random.choice(words) if random.random() < 0.9 else "" for _ in range(length))


def grown(random: random.Random, key: str) -> str:
    """A pattern that is near a key: words replaced by wildcards, left out, or with a `#` beside."""
    pattern: list[str] = []
    for word in key.split(".") if key else []:
        chance = random.random()
        if chance < 0.4:
            pattern.append(word)
        elif chance < 0.6:
            pattern.append("*")
        elif chance < 0.9:
            pattern += ["#"] * random.randrange(1, 4)
        if random.random() < 0.15:
            pattern.append("#")
    return ".".join(pattern)


def test_a_hundred_thousand_topics_match_as_the_reference_says() -> None:
    chosen = random.Random(SEED)
    wrong, matches, empty_words, hashes = [], 0, 0, 0
    for _ in range(PAIRS):
        key = random_key(chosen, "ab")
        pattern = grown(chosen, key) if chosen.random() < 0.6 else random_key(chosen, "ab*##")
        expected = fits(pattern, key)
        if topic_matches(pattern, key) is not expected:
            wrong.append((pattern, key, expected))
        matches += expected
        empty_words += ".." in f".{key}." or not key
        hashes += pattern.count("#") > 2
    assert wrong[:20] == [], f"seed {SEED}: {len(wrong)} of {PAIRS} differ"
    # The pairs are worth something: many of each sort.
    assert PAIRS * 0.2 < matches < PAIRS * 0.8
    assert empty_words > PAIRS * 0.1
    assert hashes > PAIRS * 0.1


@pytest.mark.parametrize(
    ("pattern", "key", "fit"),
    [
        ("*.orange.*", "quick.orange.rabbit", True),
        ("*.*.rabbit", "quick.orange.rabbit", True),
        ("lazy.#", "lazy.orange.new.rabbit", True),
        ("*.orange.*", "lazy.brown.fox", False),
        ("*.orange.*", "quick.orange.new.rabbit", False),
        ("*.*.rabbit", "quick.orange.new.rabbit", False),
        ("*.orange.*", "orange", False),
        ("lazy.#", "lazy", True),
        ("#", "", True),
        ("*", "", False),
        ("a.*.b", "a..b", True),
        ("a.b", "a..b", False),
        ("#.#", "", True),
    ],
)
def test_the_reference_knows_the_examples_of_the_documentation(pattern: str, key: str, fit: bool) -> None:
    assert fits(pattern, key) is fit


NAMES = st.sampled_from(["e1", "e2", "e3", "e4"])
QUEUES = ("q1", "q2", "q3")
WORDS = st.sampled_from(["a", "b", ""])
KEYS = st.lists(WORDS, max_size=3).map(".".join)
PATTERNS = st.lists(st.one_of(WORDS, st.sampled_from(["*", "#"])), max_size=3).map(".".join)
EXCHANGES = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(["direct", "topic", "fanout"]), st.none() | st.sampled_from(["e1", "e2", "e3", "gone"])),
    min_size=1,
)
BINDINGS = st.lists(st.tuples(NAMES, st.sampled_from(QUEUES), PATTERNS | KEYS), unique=True, max_size=8)


@steady
@given(kinds=EXCHANGES, bound=BINDINGS, key=KEYS)
def test_every_topology_routes_as_the_reference_says(
    kinds: dict[str, tuple[str, str | None]], bound: list[tuple[str, str, str]], key: str
) -> None:
    exchanges = {
        name: Exchange(name=name, kind=kind, alternate=alternate)  # type: ignore[arg-type]
        for name, (kind, alternate) in kinds.items()
    }
    bound = [binding for binding in bound if binding[0] in exchanges]
    by_exchange: dict[str, list[tuple[str, str]]] = {}
    for exchange, queue, wanted in bound:
        by_exchange.setdefault(exchange, []).append((queue, wanted))
    known = Known(exchanges=exchanges, bindings=by_exchange, queues={name: Queue(name=name) for name in QUEUES})
    for exchange in exchanges:
        names = [queue.name for queue in known.route(exchange, key)]
        assert len(names) == len(set(names))
        assert set(names) == reached(exchanges, bound, exchange, key)
    with pytest.raises(NoSuchExchange, match="'gone'"):
        known.route("gone", key)


@pytest.mark.parametrize("key", [*QUEUES, "nobody", "", "#"])
def test_the_default_exchange_knows_queues_by_their_name_alone(key: str) -> None:
    known = Known(exchanges={}, bindings={}, queues={name: Queue(name=name) for name in QUEUES})
    assert [queue.name for queue in known.route("", key)] == ([key] if key in QUEUES else [])
