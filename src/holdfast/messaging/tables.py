"""The messaging room's tables; every name begins with `hf_`, since they may live in a user's own database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

from holdfast.db.migrate import History

metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"})

# On SQLite only a column of exactly this type is the key of the table itself; any other gets an index beside it.
ROW_ID = BigInteger().with_variant(Integer, "sqlite")

exchanges = Table(
    "hf_exchange",
    metadata,
    Column("name", Text, primary_key=True),
    Column("arguments", Text, nullable=False),  # JSON; what differs from a plain exchange
)

queues = Table(
    "hf_queue",
    metadata,
    Column("name", Text, primary_key=True),
    Column("arguments", Text, nullable=False),  # JSON; what differs from a plain queue
    Column("owner", BigInteger),  # the instance that an exclusive queue belongs to
    Column("used_us", BigInteger, nullable=False),  # when a queue that may pass was last seen in use
    Column("active", BigInteger),  # the consumer that has all messages of a queue with a single active one
    Column("active_until_us", BigInteger),
)

bindings = Table(
    "hf_binding",
    metadata,
    Column("exchange", Text, ForeignKey("hf_exchange.name"), primary_key=True),
    Column("queue", Text, ForeignKey("hf_queue.name"), primary_key=True),
    Column("routing_key", Text, primary_key=True),
)

# One row per message and queue. `due_us` is when it may be delivered next: its delay before the first delivery, the end
# of the lease while somebody holds it, the retry's instant afterwards. So one index serves claiming, and a crashed
# holder's messages come back by themselves.
messages = Table(
    "hf_message",
    metadata,
    Column("id", ROW_ID, primary_key=True, autoincrement=False),
    Column("queue", Text, nullable=False),  # no foreign key: its check would lock the queue row for every message
    Column("due_us", BigInteger, nullable=False),
    Column("ready_us", BigInteger, nullable=False),  # `due_us` as it was before anybody held it: the order of delivery
    Column("lease", BigInteger),
    Column("attempt", Integer, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),  # deliveries that ended without an outcome
    Column("cancel_key", Text),
    Column("expires_us", BigInteger),  # not delivered from this instant on, but dead-lettered or dropped
    Column("message_id", Text, nullable=False),
    Column("exchange", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("headers", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("published_us", BigInteger, nullable=False),
)
# Its last column is for counting: with it, what is ready, unacked or delayed is told without reading a row.
Index("ix_hf_message_ready", messages.c.queue, messages.c.due_us, messages.c.id, messages.c.lease)
Index(
    "ix_hf_message_cancel_key",
    messages.c.cancel_key,
    sqlite_where=messages.c.cancel_key.is_not(None),
    postgresql_where=messages.c.cancel_key.is_not(None),
)
Index(
    "ix_hf_message_expires",
    messages.c.expires_us,
    messages.c.id,
    sqlite_where=messages.c.expires_us.is_not(None),
    postgresql_where=messages.c.expires_us.is_not(None),
)

# The effect of (consumer, message) happened.
inbox = Table(
    "hf_inbox",
    metadata,
    Column("consumer", Text, primary_key=True),
    Column("message_id", Text, primary_key=True),
    Column("done_us", BigInteger, nullable=False),
    sqlite_with_rowid=False,  # the key is all there is
)

# Messages that were given up on, kept for a human. `replay_id` is the row of hf_message that carries one while it is
# `pending`; ids are never used twice, so whatever settles another row cannot touch this one.
parked = Table(
    "hf_parked",
    metadata,
    Column("id", ROW_ID, primary_key=True, autoincrement=False),
    Column("queue", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("exchange", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("headers", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("published_us", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("parked_us", BigInteger, nullable=False),  # the first time
    Column("failed_us", BigInteger, nullable=False),  # the last time
    Column("error", Text, nullable=False),  # the exception's class; empty when a bare sentence was the reason
    Column("group_key", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("loops", Integer, nullable=False),  # how often a replay of it failed again
    Column("replay_id", BigInteger),
    CheckConstraint("state IN ('parked', 'pending', 'done', 'discarded')", name="ck_hf_parked_state"),
    CheckConstraint("(state = 'pending') = (replay_id IS NOT NULL)", name="ck_hf_parked_replay"),
)
Index("ix_hf_parked_state", parked.c.state, parked.c.id)

# What was done with parked messages, and by whom; written in the same commit, never changed.
parked_audit = Table(
    "hf_parked_audit",
    metadata,
    Column("id", ROW_ID, primary_key=True, autoincrement=False),
    Column("at_us", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("parked_id", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("headers_before", Text),
    Column("headers_after", Text),
    Column("body_before", LargeBinary),
    Column("body_after", LargeBinary),
)
Index("ix_hf_parked_audit_message", parked_audit.c.parked_id, parked_audit.c.id)

HISTORY = History(name="messaging", folder=Path(__file__).parent / "migrations")
