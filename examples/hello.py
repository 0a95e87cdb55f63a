"""Hello: one message and its handler, on SQLite in memory. Run it with `python examples/hello.py`."""

import asyncio

import msgspec

import holdfast


class Hello(msgspec.Struct):
    name: str


async def main() -> None:
    async def greet(hello: Hello) -> None:  # the annotation says which messages come here
        print("handled:", hello.name)
        done.set()

    done, queue = asyncio.Event(), holdfast.Queue(name="hello")
    database = await holdfast.connect(holdfast.DatabaseSettings(url="sqlite://"))
    await holdfast.migrate(database, [holdfast.HISTORY])
    async with holdfast.open_messaging(database, {"hello": Hello}, holdfast.Topology(queues=[queue])) as bus:
        bus.listen(holdfast.Listen(name="greet", queue="hello", handlers=[greet]))
        print("stored:", await bus.publisher.publish("", "hello", Hello(name="Ann")))
        await done.wait()
    await database.close()


asyncio.run(main())
