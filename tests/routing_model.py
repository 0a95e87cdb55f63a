"""Routing as RabbitMQ's documentation tells it, written without a look at ours: the reference for the model tests."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from holdfast.messaging.topology import Exchange


def fits(pattern: str, key: str) -> bool:
    """Whether a topic pattern fits a key: one row of a table for each pattern word, one column for each key word.

    A cell says whether the pattern so far fits the key so far.
    """
    words = key.split(".") if key else []
    row = [True] + [False] * len(words)  # no pattern word fits no key word only
    for wanted in pattern.split(".") if pattern else []:
        if wanted == "#":
            first = row.index(True) if True in row else len(row)
            row = [column >= first for column in range(len(row))]
        else:
            row = [False] + [row[at] and wanted in ("*", word) for at, word in enumerate(words)]
    return row[-1]


def reached(
    exchanges: Mapping[str, Exchange], bindings: Collection[tuple[str, str, str]], exchange: str, key: str
) -> set[str]:
    """The queues of a message over bindings of (exchange, queue, key); what no queue takes asks the alternate."""
    visited: list[str] = []
    while exchange in exchanges and exchange not in visited:
        here = exchanges[exchange]
        found = {queue for source, queue, wanted in bindings if source == exchange and _takes(here.kind, wanted, key)}
        if found:
            return found
        visited.append(exchange)
        exchange = here.alternate or ""
    return set()


def _takes(kind: str, wanted: str, key: str) -> bool:
    return kind == "fanout" or (kind == "direct" and wanted == key) or (kind == "topic" and fits(wanted, key))
