"""Request and reply: every question gets its own answer or is told in time that there is none."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.bootstrap import System
from holdfast.errors import InvalidInput, NoSuchExchange, ReplyTimeout, ShuttingDown, Unroutable
from holdfast.messaging.injection import Incoming
from tests.conftest import WAIT_S, StartSystem, eventually
from tests.contract.notes import EXCHANGE, KEY, QUEUE, Memo, Note, counts, counts_become, office, parks, plainly, send


def answering(system: System, asked: list[str] | None = None) -> None:
    """A listener that answers each note with a memo in capitals."""

    async def answer(incoming: Incoming) -> None:
        if asked is not None:
            asked.append(incoming.body.text)
        await system.messaging.reply(incoming, Memo(incoming.body.text.upper()))

    system.listen(plainly(answer))


async def replies_to(system: System) -> list[str]:
    return [each.name for each in (await system.transport.topology()).queues if each.name.startswith("replies.")]


async def test_each_question_gets_its_own_answer(start_system: StartSystem) -> None:
    system = await office(start_system)
    answering(system)
    async with system.messaging.requester() as requests:
        texts = [f"question {number}" for number in range(50)]
        answers = await asyncio.gather(*(requests.ask(EXCHANGE, KEY, Note(text), deadline_s=WAIT_S) for text in texts))
        assert answers == [Memo(text.upper()) for text in texts]
        (queue,) = await replies_to(system)
        await counts_become(system, (0, 0, 0), queue)
    assert await replies_to(system) == []


async def test_two_programs_do_not_get_each_others_answers(start_system: StartSystem) -> None:
    system = await office(start_system)
    answering(system)
    async with system.messaging.requester() as ours, system.messaging.requester() as theirs:
        answers = await asyncio.gather(
            *(each.ask(EXCHANGE, KEY, Note(name), deadline_s=WAIT_S) for each, name in ((ours, "ours"), (theirs, "x")))
        )
    assert answers == [Memo("OURS"), Memo("X")]


async def test_without_an_answer_the_deadline_says_that_nobody_knows(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with system.messaging.requester() as requests:
        with pytest.raises(ReplyTimeout, match="may or may not"):
            await requests.ask(EXCHANGE, KEY, Note("anybody?"), deadline_s=0.2)

        async def expired() -> bool:
            return await counts(system) == (0, 0, 0)

        await eventually(expired, "nobody begins to handle it any more")
        asked: list[str] = []
        answering(system, asked)
        assert await requests.ask(EXCHANGE, KEY, Note("now"), deadline_s=WAIT_S) == Memo("NOW")
        assert asked == ["now"]


async def test_an_answer_that_comes_too_late_is_dropped(start_system: StartSystem) -> None:
    system = await office(start_system)
    gate = asyncio.Event()

    async def late(incoming: Incoming) -> None:
        await gate.wait()
        await system.messaging.reply(incoming, Memo("too late"))

    system.listen(plainly(late))
    async with system.messaging.requester() as requests:
        with pytest.raises(ReplyTimeout):
            await requests.ask(EXCHANGE, KEY, Note("hurry"), deadline_s=0.3)
        gate.set()
        await counts_become(system, (0, 0, 0))
        assert await requests.ask(EXCHANGE, KEY, Note("again"), deadline_s=WAIT_S) == Memo("too late")


async def test_what_cannot_be_sent_is_told_as_a_publisher_tells_it(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with system.messaging.requester() as requests:
        with pytest.raises(NoSuchExchange):
            await requests.ask("nowhere", KEY, Note("x"))
        with pytest.raises(Unroutable):
            await requests.ask(EXCHANGE, "letter", Note("x"))


async def test_who_still_waits_when_the_program_stops_is_told(start_system: StartSystem) -> None:
    system = await office(start_system)
    requests = system.messaging.requester()
    async with requests:
        asking = asyncio.create_task(requests.ask(EXCHANGE, KEY, Note("x"), deadline_s=WAIT_S))
        await counts_become(system, (1, 0, 0))
    with pytest.raises(ShuttingDown):
        await asking


async def test_a_message_that_is_no_request_cannot_be_answered(start_system: StartSystem) -> None:
    system = await office(start_system)
    answering(system)
    await send(system, "no question")
    (parked,) = await parks(system)
    assert parked.reason.startswith("InvalidInput: this message is no request")
    assert await counts(system, QUEUE) == (0, 0, 0)
    with pytest.raises(InvalidInput):
        await system.transport.stats("replies.none")
