"""Queues as rows, inbox and parked messages."""

import sqlalchemy as sa
from alembic import op

revision = "messaging_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hf_exchange",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_hf_exchange")),
    )
    op.create_table(
        "hf_inbox",
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("done_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "message_id", name=op.f("pk_hf_inbox")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "hf_message",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("due_us", sa.BigInteger(), nullable=False),
        sa.Column("ready_us", sa.BigInteger(), nullable=False),
        sa.Column("lease", sa.BigInteger(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("cancel_key", sa.Text(), nullable=True),
        sa.Column("expires_us", sa.BigInteger(), nullable=True),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("exchange", sa.Text(), nullable=False),
        sa.Column("routing_key", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("published_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hf_message")),
    )
    op.create_index(
        "ix_hf_message_cancel_key",
        "hf_message",
        ["cancel_key"],
        unique=False,
        sqlite_where=sa.text("cancel_key IS NOT NULL"),
        postgresql_where=sa.text("cancel_key IS NOT NULL"),
    )
    op.create_index(
        "ix_hf_message_expires",
        "hf_message",
        ["expires_us", "id"],
        unique=False,
        sqlite_where=sa.text("expires_us IS NOT NULL"),
        postgresql_where=sa.text("expires_us IS NOT NULL"),
    )
    op.create_index("ix_hf_message_ready", "hf_message", ["queue", "due_us", "id", "lease"], unique=False)
    op.create_table(
        "hf_parked",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("exchange", sa.Text(), nullable=False),
        sa.Column("routing_key", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("published_us", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("parked_us", sa.BigInteger(), nullable=False),
        sa.Column("failed_us", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("group_key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("loops", sa.Integer(), nullable=False),
        sa.Column("replay_id", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(state = 'pending') = (replay_id IS NOT NULL)", name="ck_hf_parked_replay"),
        sa.CheckConstraint("state IN ('parked', 'pending', 'done', 'discarded')", name="ck_hf_parked_state"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hf_parked")),
    )
    op.create_index("ix_hf_parked_state", "hf_parked", ["state", "id"], unique=False)
    op.create_table(
        "hf_parked_audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("parked_id", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("headers_before", sa.Text(), nullable=True),
        sa.Column("headers_after", sa.Text(), nullable=True),
        sa.Column("body_before", sa.LargeBinary(), nullable=True),
        sa.Column("body_after", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hf_parked_audit")),
    )
    op.create_index("ix_hf_parked_audit_message", "hf_parked_audit", ["parked_id", "id"], unique=False)
    op.create_table(
        "hf_queue",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.Column("owner", sa.BigInteger(), nullable=True),
        sa.Column("used_us", sa.BigInteger(), nullable=False),
        sa.Column("active", sa.BigInteger(), nullable=True),
        sa.Column("active_until_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_hf_queue")),
    )
    op.create_table(
        "hf_binding",
        sa.Column("exchange", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("routing_key", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["exchange"],
            ["hf_exchange.name"],
        ),
        sa.ForeignKeyConstraint(
            ["queue"],
            ["hf_queue.name"],
        ),
        sa.PrimaryKeyConstraint("exchange", "queue", "routing_key", name=op.f("pk_hf_binding")),
    )


def downgrade() -> None:
    op.drop_table("hf_binding")
    op.drop_table("hf_queue")
    op.drop_index("ix_hf_parked_audit_message", table_name="hf_parked_audit")
    op.drop_table("hf_parked_audit")
    op.drop_index("ix_hf_parked_state", table_name="hf_parked")
    op.drop_table("hf_parked")
    op.drop_index("ix_hf_message_ready", table_name="hf_message")
    op.drop_index(
        "ix_hf_message_expires",
        table_name="hf_message",
        sqlite_where=sa.text("expires_us IS NOT NULL"),
        postgresql_where=sa.text("expires_us IS NOT NULL"),
    )
    op.drop_index(
        "ix_hf_message_cancel_key",
        table_name="hf_message",
        sqlite_where=sa.text("cancel_key IS NOT NULL"),
        postgresql_where=sa.text("cancel_key IS NOT NULL"),
    )
    op.drop_table("hf_message")
    op.drop_table("hf_inbox")
    op.drop_table("hf_exchange")
