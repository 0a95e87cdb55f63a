"""Stock, orders, payments and the sandbox provider."""

import sqlalchemy as sa
from alembic import op

revision = "services_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "order_line",
        sa.Column("order_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("line_no", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("price_minor", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_order_line_quantity")),
        sa.PrimaryKeyConstraint("order_id", "line_no", name=op.f("pk_order_line")),
    )
    op.create_table(
        "order_log",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("from_status", sa.Text(), nullable=True),
        sa.Column("to_status", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_order_log")),
        sa.UniqueConstraint("order_id", "to_status", name="uq_order_log_order_id_to_status"),
    )
    op.create_table(
        "order_order",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("buyer", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("payment", sa.Text(), nullable=False),
        sa.Column("pay_by_us", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "status IN ('pending_payment', 'paid', 'cancelled', 'closed')", name=op.f("ck_order_order_status")
        ),
        sa.CheckConstraint("amount_minor >= 0", name=op.f("ck_order_order_amount")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_order_order")),
    )
    op.create_index(
        "ix_order_order_due",
        "order_order",
        ["pay_by_us"],
        unique=False,
        sqlite_where=sa.text("status = 'pending_payment'"),
        postgresql_where=sa.text("status = 'pending_payment'"),
    )
    op.create_table(
        "order_reply",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("buyer", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", "buyer", name=op.f("pk_order_reply")),
    )
    op.create_table(
        "payment_notice",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("payment_id", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("merchant_id", sa.Text(), nullable=False),
        sa.Column("trade_no", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("captured_us", sa.BigInteger(), nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("received_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("provider", "event_id", name=op.f("pk_payment_notice")),
    )
    op.create_index(
        "ix_payment_notice_undecided",
        "payment_notice",
        ["provider", "event_id"],
        unique=False,
        sqlite_where=sa.text("verdict IN ('received', 'unknown_payment')"),
        postgresql_where=sa.text("verdict IN ('received', 'unknown_payment')"),
    )
    op.create_table(
        "payment_order",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("buyer", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("trade_no", sa.Text(), nullable=True),
        sa.Column("captured_minor", sa.BigInteger(), nullable=False),
        sa.Column("refunded_minor", sa.BigInteger(), nullable=False),
        sa.Column("captured_us", sa.BigInteger(), nullable=True),
        sa.Column("accepted_us", sa.BigInteger(), nullable=True),
        sa.Column("pay_by_us", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "0 <= refunded_minor AND refunded_minor <= captured_minor", name=op.f("ck_payment_order_refunded")
        ),
        sa.CheckConstraint("captured_minor IN (0, amount_minor)", name=op.f("ck_payment_order_captured")),
        sa.CheckConstraint("status IN (0, 1, 2, 3)", name=op.f("ck_payment_order_status")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payment_order")),
        sa.UniqueConstraint("order_id", name=op.f("uq_payment_order_order_id")),
    )
    op.create_index(
        "ix_payment_order_unaccepted",
        "payment_order",
        ["changed_us"],
        unique=False,
        sqlite_where=sa.text("status = 3 AND accepted_us IS NULL"),
        postgresql_where=sa.text("status = 3 AND accepted_us IS NULL"),
    )
    op.create_index(
        "ix_payment_order_waiting",
        "payment_order",
        ["id"],
        unique=False,
        sqlite_where=sa.text("status = 1"),
        postgresql_where=sa.text("status = 1"),
    )
    op.create_table(
        "payment_refund",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payment_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('pending', 'done')", name=op.f("ck_payment_refund_status")),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_payment_refund_amount")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payment_refund")),
        sa.UniqueConstraint("key", name=op.f("uq_payment_refund_key")),
    )
    op.create_index(
        "ix_payment_refund_pending",
        "payment_refund",
        ["changed_us"],
        unique=False,
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_table(
        "sandbox_refund",
        sa.Column("refund_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("payment_id", sa.BigInteger(), nullable=False),
        sa.Column("trade_no", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("refund_id", name=op.f("pk_sandbox_refund")),
    )
    op.create_table(
        "sandbox_trade",
        sa.Column("payment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("trade_no", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('paid', 'closed')", name=op.f("ck_sandbox_trade_status")),
        sa.PrimaryKeyConstraint("payment_id", name=op.f("pk_sandbox_trade")),
    )
    op.create_table(
        "stock_ledger",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("warehouse", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("available_delta", sa.BigInteger(), nullable=False),
        sa.Column("held_delta", sa.BigInteger(), nullable=False),
        sa.Column("sold_delta", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('receive', 'reserve', 'release', 'deduct')", name=op.f("ck_stock_ledger_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stock_ledger")),
        sa.UniqueConstraint("kind", "cause", name="uq_stock_ledger_kind_cause"),
    )
    op.create_table(
        "stock_level",
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("warehouse", sa.Text(), nullable=False),
        sa.Column("available", sa.BigInteger(), nullable=False),
        sa.Column("held", sa.BigInteger(), nullable=False),
        sa.Column("sold", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("available + held + sold = total", name=op.f("ck_stock_level_sums_up")),
        sa.CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name=op.f("ck_stock_level_never_negative")),
        sa.PrimaryKeyConstraint("sku", "warehouse", name=op.f("pk_stock_level")),
    )
    op.create_table(
        "stock_sku",
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("price_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("price_minor >= 0", name=op.f("ck_stock_sku_price")),
        sa.PrimaryKeyConstraint("sku", name=op.f("pk_stock_sku")),
    )
    op.create_table(
        "stock_task",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stock_task")),
        sa.UniqueConstraint("order_id", name=op.f("uq_stock_task_order_id")),
    )
    op.create_table(
        "stock_task_detail",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), nullable=False),
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("warehouse", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_stock_task_detail_quantity")),
        sa.CheckConstraint("status IN (1, 2, 3)", name=op.f("ck_stock_task_detail_status")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stock_task_detail")),
    )
    op.create_index(
        "ix_stock_task_detail_held",
        "stock_task_detail",
        ["order_id"],
        unique=False,
        sqlite_where=sa.text("status = 1"),
        postgresql_where=sa.text("status = 1"),
    )
    op.create_index("ix_stock_task_detail_order_id", "stock_task_detail", ["order_id"], unique=False)
    op.create_table(
        "stock_warehouse",
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("code", name=op.f("pk_stock_warehouse")),
    )


def downgrade() -> None:
    op.drop_table("stock_warehouse")
    op.drop_index("ix_stock_task_detail_order_id", table_name="stock_task_detail")
    op.drop_index(
        "ix_stock_task_detail_held",
        table_name="stock_task_detail",
        sqlite_where=sa.text("status = 1"),
        postgresql_where=sa.text("status = 1"),
    )
    op.drop_table("stock_task_detail")
    op.drop_table("stock_task")
    op.drop_table("stock_sku")
    op.drop_table("stock_level")
    op.drop_table("stock_ledger")
    op.drop_table("sandbox_trade")
    op.drop_table("sandbox_refund")
    op.drop_index(
        "ix_payment_refund_pending",
        table_name="payment_refund",
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.drop_table("payment_refund")
    op.drop_index(
        "ix_payment_order_waiting",
        table_name="payment_order",
        sqlite_where=sa.text("status = 1"),
        postgresql_where=sa.text("status = 1"),
    )
    op.drop_index(
        "ix_payment_order_unaccepted",
        table_name="payment_order",
        sqlite_where=sa.text("status = 3 AND accepted_us IS NULL"),
        postgresql_where=sa.text("status = 3 AND accepted_us IS NULL"),
    )
    op.drop_table("payment_order")
    op.drop_index(
        "ix_payment_notice_undecided",
        table_name="payment_notice",
        sqlite_where=sa.text("verdict IN ('received', 'unknown_payment')"),
        postgresql_where=sa.text("verdict IN ('received', 'unknown_payment')"),
    )
    op.drop_table("payment_notice")
    op.drop_table("order_reply")
    op.drop_index(
        "ix_order_order_due",
        table_name="order_order",
        sqlite_where=sa.text("status = 'pending_payment'"),
        postgresql_where=sa.text("status = 'pending_payment'"),
    )
    op.drop_table("order_order")
    op.drop_table("order_log")
    op.drop_table("order_line")
