"""Topology: what may be declared, and which queues a routing key reaches."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.messaging.routing import route, topic_matches
from holdfast.messaging.topology import NAME_BYTES_MAX, Binding, Exchange, Queue, Topology
from tests.unit.given import steady

WORDS = st.sampled_from(["a", "b", "ab", ""])
KEYS = st.lists(WORDS, max_size=6).map(".".join)
PATTERNS = st.lists(st.one_of(WORDS, st.just("*"), st.just("#")), max_size=6).map(".".join)


def naive(pattern: list[str], words: list[str]) -> bool:
    """The rule as it is told: `*` eats one word, `#` none or one and stays."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return naive(pattern[1:], words) or (bool(words) and naive(pattern, words[1:]))
    return bool(words) and pattern[0] in ("*", words[0]) and naive(pattern[1:], words[1:])


def words_of(key: str) -> list[str]:
    return key.split(".") if key else []


@steady
@given(pattern=PATTERNS, key=KEYS)
@example(pattern="", key="")
@example(pattern="#", key="")
@example(pattern="*", key="")
@example(pattern="#.a.#.b", key="a.b.a.a.b")
@example(pattern="a.#.#.*", key="a.b")
def test_topics_match_as_the_naive_rule_says(pattern: str, key: str) -> None:
    assert topic_matches(pattern, key) is naive(words_of(pattern), words_of(key))


@pytest.mark.parametrize(
    ("pattern", "key", "fits"),
    [
        ("order.*", "order.created", True),
        ("order.*", "order", False),
        ("order.*", "order.created.twice", False),
        ("order.#", "order", True),
        ("order.#", "order.created.twice", True),
        ("#.created", "created", True),
        ("#", "", True),
        ("*", "", False),
        ("", "", True),
        ("", "order", False),
        ("order", "Order", False),
        ("a.*.c", "a..c", True),
        ("or*", "order", False),
        ("*.*.#", "a.b", True),
    ],
)
def test_topics_match_as_in_rabbitmq(pattern: str, key: str, fits: bool) -> None:
    assert topic_matches(pattern, key) is fits


@steady
@given(key=KEYS)
def test_a_hash_alone_takes_everything(key: str) -> None:
    assert topic_matches("#", key)


@steady
@given(key=st.lists(st.sampled_from(["a", "b"]), max_size=8).map(".".join))
def test_a_key_matches_itself(key: str) -> None:
    assert topic_matches(key, key)


def test_many_hashes_do_not_explode() -> None:
    """In a process of its own, since a match that tries everything would never come back to be judged."""
    code = (
        "from holdfast.messaging.routing import topic_matches\n"
        "words = '.'.join(['a'] * 200)\n"
        "assert not topic_matches('.'.join(['#', 'a'] * 100 + ['b']), words)\n"
        "assert topic_matches('.'.join(['#', 'a'] * 100 + ['#']), words)\n"
        "assert topic_matches('.'.join(['#'] * 100), words)\n"
        "assert not topic_matches('.'.join(['#'] * 100 + ['b']), words)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_a_direct_exchange_compares_and_a_fanout_does_not() -> None:
    bound = [("mail", "order.created"), ("audit", "#"), ("mail", "order.paid")]
    assert route("direct", bound, "order.created") == ["mail"]
    assert route("direct", bound, "#") == ["audit"]
    assert route("fanout", bound, "whatever") == ["mail", "audit"]
    assert route("topic", bound, "order.paid") == ["audit", "mail"]


def test_a_queue_that_is_bound_twice_gets_the_message_once() -> None:
    assert route("topic", [("mail", "#"), ("mail", "order.*")], "order.paid") == ["mail"]


def test_no_binding_reaches_no_queue() -> None:
    assert route("topic", [], "order.paid") == []
    assert route("topic", [("mail", "stock.*")], "order.paid") == []


@pytest.mark.parametrize("name", ["", "amq.topic", "x" * (NAME_BYTES_MAX + 1), "é" * 128])
def test_names_that_a_broker_would_refuse_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="exchange"):
        Exchange(name=name)
    with pytest.raises(InvalidInput, match="queue"):
        Queue(name=name)


def test_names_up_to_the_limit_are_taken() -> None:
    assert Queue(name="é" * 127).name == "é" * 127
    assert Exchange(name="x" * NAME_BYTES_MAX).kind == "topic"


def test_a_long_routing_key_is_refused_without_repeating_all_of_it() -> None:
    with pytest.raises(InvalidInput, match="longer than 255 bytes") as caught:
        Binding(exchange="e", queue="q", routing_key="k" * 10_000)
    assert len(caught.value.detail) < 200


def test_a_binding_to_something_undeclared_is_refused_by_name() -> None:
    binding = Binding(exchange="orders", queue="mail")
    with pytest.raises(InvalidInput, match="undeclared exchange 'orders'"):
        Topology(queues=[Queue(name="mail")], bindings=[binding])
    with pytest.raises(InvalidInput, match="undeclared queue 'mail'"):
        Topology(exchanges=[Exchange(name="orders")], bindings=[binding])


def test_topologies_add_up() -> None:
    binding = Binding(exchange="orders", queue="mail", routing_key="#")
    one = Topology(exchanges=[Exchange(name="orders")], queues=[Queue(name="mail")], bindings=[binding])
    two = Topology(exchanges=[Exchange(name="stock")])
    both = one + two
    assert [exchange.name for exchange in both.exchanges] == ["orders", "stock"]
    assert (tuple(both.queues), tuple(both.bindings)) == (tuple(one.queues), (binding,))


def test_a_topology_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidInput, match="orders"):
        Topology(exchanges=[Exchange(name="orders", kind="topic"), Exchange(name="orders", kind="fanout")])
