"""What would have to change for the declared topology to become the wanted one; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from holdfast.messaging.topology import Binding, Exchange, Queue, Topology, differences


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One difference: what is to be made, changed or removed, in words."""

    action: Literal["create", "change", "remove"]
    what: Literal["exchange", "queue", "binding"]
    name: str
    detail: str = ""


def plan(actual: Topology, wanted: Topology, *, prune: bool = False) -> list[Change]:
    """The differences in the order in which they can be made; none when there is nothing to do.

    What exists beside the wanted topology belongs to somebody else and stays, except with `prune`: then bindings of
    wanted queues that nobody wants any more are to be removed. Exchanges and queues are never removed.
    """
    changes = [
        *_declared("exchange", actual.exchanges, wanted.exchanges),
        *_declared("queue", actual.queues, wanted.queues),
    ]
    bound = {_key(each) for each in actual.bindings}
    changes += [
        Change(action="create", what="binding", name=_told(each))
        for each in dict.fromkeys(_key(each) for each in wanted.bindings)
        if each not in bound
    ]
    if prune:
        unwanted = sorted({_key(each) for each in surplus(actual, wanted)})
        changes += [Change(action="remove", what="binding", name=_told(each)) for each in unwanted]
    return changes


def surplus(actual: Topology, wanted: Topology) -> list[Binding]:
    """The bindings that `plan` with `prune` would remove."""
    keep = {_key(each) for each in wanted.bindings}
    ours = {each.name for each in wanted.queues}
    return [each for each in actual.bindings if _key(each) not in keep and each.queue in ours]


def _declared(
    what: Literal["exchange", "queue"],
    actual: Sequence[Exchange] | Sequence[Queue],
    wanted: Sequence[Exchange] | Sequence[Queue],
) -> list[Change]:
    known = {each.name: each for each in actual}
    changes = []
    for name, each in {each.name: each for each in wanted}.items():
        if name not in known:
            plain = type(each)(name=name)
            told = ", ".join(f"{argument}={value!r}" for argument, _, value in differences(plain, each))
            changes.append(Change(action="create", what=what, name=name, detail=told))
        elif different := differences(known[name], each):
            told = ", ".join(f"{argument}: {old!r} -> {new!r}" for argument, old, new in different)
            changes.append(Change(action="change", what=what, name=name, detail=told))
    return changes


def _key(binding: Binding) -> tuple[str, str, str]:
    return binding.exchange, binding.queue, binding.routing_key


def _told(key: tuple[str, str, str]) -> str:
    exchange, queue, routing_key = key
    return f"{exchange} -> {queue} ({routing_key})"
