"""Which queues a message reaches: RabbitMQ's rules for direct, topic and fanout exchanges, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.errors import InvalidInput
from holdfast.messaging.topology import ExchangeKind


def route(kind: ExchangeKind, bindings: Iterable[tuple[str, str]], routing_key: str) -> list[str]:
    """The queues, each once, that a message with this key reaches over bindings of (queue, binding key)."""
    match kind:
        case "fanout":
            chosen = (queue for queue, _ in bindings)
        case "direct":
            chosen = (queue for queue, key in bindings if key == routing_key)
        case "topic":
            chosen = (queue for queue, key in bindings if topic_matches(key, routing_key))
        case "headers":
            raise InvalidInput("an exchange of the kind headers is for a broker to route")
    return list(dict.fromkeys(chosen))


def topic_matches(pattern: str, routing_key: str) -> bool:
    """Whether a topic binding key fits: `*` is exactly one word, `#` any number of words, also none.

    Words are what stands between dots; an empty key has no words at all, as in RabbitMQ.
    Time is at most words in the pattern times words in the key: only the last `#` is ever taken back.
    """
    wanted, words = _words(pattern), _words(routing_key)
    at = word = 0
    hash_at, hash_word = -1, 0
    while word < len(words):
        if at < len(wanted) and wanted[at] == "#":
            hash_at, hash_word = at, word
            at += 1
        elif at < len(wanted) and wanted[at] in ("*", words[word]):
            at += 1
            word += 1
        elif hash_at >= 0:
            hash_word += 1
            at, word = hash_at + 1, hash_word
        else:
            return False
    return all(rest == "#" for rest in wanted[at:])


def _words(key: str) -> list[str]:
    return key.split(".") if key else []
