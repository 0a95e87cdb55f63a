"""Tables, engines and seeding of the baseline, on PostgreSQL (asyncpg) or SQLite (aiosqlite)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CURRENCY = "CNY"
PRICE_MINOR = 1000
SQLITE_READERS = 4
SEED_LOCK = 202501
"""Any number; workers that start together take turns under this PostgreSQL advisory lock."""

metadata = MetaData()
BigKey = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself in INTEGER keys only
Instant = DateTime(timezone=True)

stock = Table(
    "stock",
    metadata,
    Column("sku", String, primary_key=True),
    Column("price_minor", BigInteger, nullable=False),
    Column("available", Integer, nullable=False),
    Column("held", Integer, nullable=False),
    CheckConstraint("available >= 0"),
    CheckConstraint("held >= 0"),
)

orders = Table(
    "orders",
    metadata,
    Column("id", BigKey, primary_key=True),
    Column("buyer", String, nullable=False),
    Column("status", String, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", String, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("pay_by", Instant, nullable=False),
    Index("orders_overdue", "status", "pay_by"),
)

order_lines = Table(
    "order_lines",
    metadata,
    Column("order_id", ForeignKey("orders.id"), primary_key=True),
    Column("sku", ForeignKey("stock.sku"), primary_key=True),
    Column("quantity", Integer, nullable=False),
    Column("unit_price_minor", BigInteger, nullable=False),
)

payments = Table(
    "payments",
    metadata,
    Column("id", BigKey, primary_key=True),
    Column("order_id", ForeignKey("orders.id"), nullable=False, unique=True),
    Column("provider", String, nullable=False),
    Column("status", String, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("event_id", String, unique=True),
    Column("trade_no", String),
    Column("paid_at", Instant),
)

# The primary key lets one of two racing requests with the same key win.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("buyer", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("request_hash", String, nullable=False),
    Column("order_id", ForeignKey("orders.id"), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Database:
    """Engines for transactions that write, and for those that only read."""

    write: AsyncEngine
    read: AsyncEngine


@asynccontextmanager
async def open_database(url: str, pool_size: int) -> AsyncIterator[Database]:
    """Open the database and close its pools at the end.

    SQLite has one writer at a time.  A pool of one writing connection queues transactions in memory,
    first come first served; more connections would queue in SQLite's busy handler, which sleeps.
    """
    if make_url(url).get_backend_name() == "sqlite":
        write, read = _sqlite_engine(url, 1, "BEGIN IMMEDIATE"), _sqlite_engine(url, SQLITE_READERS, "BEGIN")
    else:
        write = read = create_async_engine(url, pool_size=pool_size, max_overflow=0)
    try:
        yield Database(write, read)
    finally:
        await write.dispose()
        await read.dispose()


def _sqlite_engine(url: str, connections: int, begin: str) -> AsyncEngine:
    engine = create_async_engine(url, pool_size=connections, max_overflow=0)

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # The driver's own BEGIN is deferred and comes late.
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


async def create_tables(database: Database, skus: int, units: int) -> None:
    """Create the tables and put the SKUs in stock, unless an earlier start has done so."""
    async with database.write.begin() as connection:
        if connection.dialect.name == "postgresql":
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SEED_LOCK})
        await connection.run_sync(metadata.create_all)
        if not await connection.scalar(select(func.count()).select_from(stock)):
            await connection.execute(
                insert(stock),
                [
                    {"sku": f"SKU-{number:02d}", "price_minor": PRICE_MINOR, "available": units, "held": 0}
                    for number in range(1, skus + 1)
                ],
            )
