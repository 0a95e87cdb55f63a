"""Dead letters: what is rejected or waits too long goes to another exchange, with its history in the headers.

Run it with `python examples/dead_letters.py`: on a throw-away SQLite file, or on the postgresql:// URL that you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec

import holdfast


class Coupon(msgspec.Struct, frozen=True):
    """A coupon to be checked."""

    code: str


TOPOLOGY = holdfast.Topology(
    exchanges=[holdfast.Exchange(name="coupons.dlx", kind="direct")],
    queues=[
        holdfast.Queue(name="coupons", message_ttl_ms=500, dead_letter_exchange="coupons.dlx"),
        holdfast.Queue(name="coupons.dead"),
    ],
    bindings=[holdfast.Binding(exchange="coupons.dlx", queue="coupons.dead", routing_key="coupons")],
)


async def check(coupon: Coupon) -> None:
    raise holdfast.Reject(f"coupon {coupon.code} is unknown")


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, {"coupon": Coupon}, TOPOLOGY) as bus:
        dead: asyncio.Queue[str] = asyncio.Queue()

        async def bury(coupon: Coupon, message: holdfast.Message) -> None:
            (death, *_) = msgspec.json.decode(message.headers["x-death"])
            await dead.put(f"{coupon.code}: {death['reason']} in {death['queue']}")

        bus.listen(holdfast.Listen(name="bury", queue="coupons.dead", handlers=[bury]))
        checks = holdfast.Listen(name="check", queue="coupons", handlers=[check], recover=holdfast.DeadLetter())
        listener = bus.listen(checks)
        await bus.publisher.publish("", "coupons", Coupon(code="FREE-BEER"))
        print(await asyncio.wait_for(dead.get(), 10))

        listener.pause()
        await bus.publisher.publish("", "coupons", Coupon(code="SUMMER"))
        print(await asyncio.wait_for(dead.get(), 10))
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
