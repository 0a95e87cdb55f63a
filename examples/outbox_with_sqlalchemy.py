"""Messages in your own SQLAlchemy session: your rows and the message commit together, and the effect happens once.

Run it with `python examples/outbox_with_sqlalchemy.py`: on a throw-away SQLite file, or on the postgresql:// URL that
you give.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import msgspec
from sqlalchemy import make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import holdfast


class Base(DeclarativeBase):
    """Your tables."""


class Member(Base):
    __tablename__ = "club_member"

    email: Mapped[str] = mapped_column(primary_key=True)
    welcomed: Mapped[bool] = mapped_column(default=False)


class WelcomeWanted(msgspec.Struct, frozen=True):
    """Somebody signed up and should be welcomed."""

    email: str


TYPES = {"welcome.wanted": WelcomeWanted}
TOPOLOGY = holdfast.Topology(
    exchanges=[holdfast.Exchange(name="club", kind="topic")],
    queues=[holdfast.Queue(name="club.welcome")],
    bindings=[holdfast.Binding(exchange="club", queue="club.welcome", routing_key="member.#")],
)

Sessions = async_sessionmaker[AsyncSession]


async def join(sessions: Sessions, outbox: holdfast.ConnectionOutbox, email: str) -> None:
    """Your code: a row and its message, in your transaction."""
    async with sessions.begin() as session:
        session.add(Member(email=email))
        await outbox.add(session, "club", "member.joined", WelcomeWanted(email=email))
        if email.startswith("nobody"):
            raise ValueError("changed my mind")


async def welcome(sessions: Sessions, inbox: holdfast.ConnectionInbox, incoming: holdfast.Incoming) -> None:
    """Your handler: whatever happens to the message, the effect happens once."""
    async with sessions.begin() as session:
        if await inbox.first(session, "welcome", incoming.delivery.message.message_id):
            member = await session.get_one(Member, incoming.body.email)
            member.welcomed = True


async def main(url: str) -> None:
    database = await holdfast.connect(holdfast.DatabaseSettings(url=url))
    await holdfast.migrate(database, [holdfast.HISTORY])
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    address = make_url(url)
    engine = create_async_engine(address.set(drivername=drivers[address.get_backend_name()]))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine)

    async with holdfast.open_messaging(database, TYPES, TOPOLOGY) as bus:
        outbox = holdfast.ConnectionOutbox(TYPES, wakes=bus)  # elsewhere without `wakes`: nothing else need run there
        inbox = holdfast.ConnectionInbox()
        done = asyncio.Event()

        async def on_welcome(incoming: holdfast.Incoming) -> None:
            await welcome(sessions, inbox, incoming)
            done.set()

        bus.listen(holdfast.Listen(name="welcome", queue="club.welcome", plain={WelcomeWanted: on_welcome}))
        try:
            await join(sessions, outbox, "nobody@example.org")
        except ValueError:
            print("rolled back: no row, and no message")
        await join(sessions, outbox, "ann@example.org")
        await asyncio.wait_for(done.wait(), 10)

    async with sessions() as session:
        welcomed = await session.scalars(select(Member.email).where(Member.welcomed))
        print("welcomed:", ", ".join(welcomed))
    await engine.dispose()
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/example.db"))
