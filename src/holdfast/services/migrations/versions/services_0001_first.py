"""Stock, orders, payments, the sandbox provider, the event feed and webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "services_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "cart_item",
        sa.Column("buyer", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_cart_item_quantity")),
        sa.PrimaryKeyConstraint("buyer", "sku", name=op.f("pk_cart_item")),
    )
    op.create_table(
        "feed_counter",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("removed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_feed_counter")),
    )
    op.create_table(
        "feed_event",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("recorded_us", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feed_event")),
        sa.UniqueConstraint("key", name=op.f("uq_feed_event_key")),
    )
    op.create_index(
        "ix_feed_event_owner",
        "feed_event",
        ["owner", "id"],
        unique=False,
        sqlite_where=sa.text("owner IS NOT NULL"),
        postgresql_where=sa.text("owner IS NOT NULL"),
    )
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
        sa.Column("note", sa.Text(), nullable=False),
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
        sa.Column("refunded_minor", sa.BigInteger(), nullable=False),
        sa.Column("tracking", sa.Text(), nullable=True),
        sa.Column("complete_by_us", sa.BigInteger(), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "status IN ('pending_payment', 'paid', 'shipped', 'completed', 'cancelled', 'closed', 'refunding', "
            "'refunded')",
            name=op.f("ck_order_order_status"),
        ),
        sa.CheckConstraint("amount_minor >= 0", name=op.f("ck_order_order_amount")),
        sa.CheckConstraint(
            "0 <= refunded_minor AND refunded_minor <= amount_minor", name=op.f("ck_order_order_refunded")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_order_order")),
    )
    op.create_index("ix_order_order_buyer", "order_order", ["buyer", "id"], unique=False)
    op.create_index(
        "ix_order_order_arriving",
        "order_order",
        ["complete_by_us"],
        unique=False,
        sqlite_where=sa.text("status = 'shipped'"),
        postgresql_where=sa.text("status = 'shipped'"),
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
        sa.Column("refunding_minor", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "0 <= refunded_minor AND 0 <= refunding_minor AND refunded_minor + refunding_minor <= captured_minor",
            name=op.f("ck_payment_order_refunded"),
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
        sa.Column("order_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("ask_us", sa.BigInteger(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('pending', 'done', 'refused')", name=op.f("ck_payment_refund_status")),
        sa.CheckConstraint("kind IN ('late', 'staff')", name=op.f("ck_payment_refund_kind")),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_payment_refund_amount")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payment_refund")),
        sa.UniqueConstraint("key", name=op.f("uq_payment_refund_key")),
    )
    op.create_index("ix_payment_refund_payment_id", "payment_refund", ["payment_id"], unique=False)
    op.create_index(
        "ix_payment_refund_pending",
        "payment_refund",
        ["ask_us"],
        unique=False,
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_table(
        "payment_refund_log",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("refund_id", sa.BigInteger(), nullable=False),
        sa.Column("from_status", sa.Text(), nullable=True),
        sa.Column("to_status", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payment_refund_log")),
    )
    op.create_index("ix_payment_refund_log_refund_id", "payment_refund_log", ["refund_id"], unique=False)
    op.create_table(
        "reconciliation_difference",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("repair", sa.Text(), nullable=False),
        sa.Column("advice", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("first_seen_us", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_us", sa.BigInteger(), nullable=False),
        sa.Column("repair_us", sa.BigInteger(), nullable=True),
        sa.Column("closed_us", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "state IN ('open', 'dismissed', 'repaired', 'gone')", name=op.f("ck_reconciliation_difference_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reconciliation_difference")),
    )
    op.create_index(
        "uq_reconciliation_difference_live",
        "reconciliation_difference",
        ["kind", "subject"],
        unique=True,
        sqlite_where=sa.text("state IN ('open', 'dismissed')"),
        postgresql_where=sa.text("state IN ('open', 'dismissed')"),
    )
    op.create_table(
        "reconciliation_log",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("difference_id", sa.BigInteger(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reconciliation_log")),
    )
    op.create_index("ix_reconciliation_log_difference_id", "reconciliation_log", ["difference_id"], unique=False)
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
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("counted", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "kind IN ('receive', 'reserve', 'release', 'deduct', 'split', 'adjust', 'count')",
            name=op.f("ck_stock_ledger_kind"),
        ),
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
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("available + held + sold = total", name=op.f("ck_stock_level_sums_up")),
        sa.CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name=op.f("ck_stock_level_never_negative")),
        sa.PrimaryKeyConstraint("sku", "warehouse", name=op.f("pk_stock_level")),
    )
    op.create_table(
        "stock_part",
        sa.Column("order_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("lines", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("order_id", "key", name=op.f("pk_stock_part")),
    )
    op.create_table(
        "stock_sku",
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("price_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("order_max", sa.BigInteger(), nullable=True),
        sa.Column("buyer_max", sa.BigInteger(), nullable=True),
        sa.Column("time_out_ms", sa.BigInteger(), nullable=True),
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
    op.create_table(
        "webhook_attempt",
        sa.Column("delivery_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("took_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("delivery_id", "attempt", name=op.f("pk_webhook_attempt")),
    )
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("endpoint_id", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("round_start", sa.Integer(), nullable=False),
        sa.Column("due_us", sa.BigInteger(), nullable=False),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "status IN ('pending', 'done', 'failed', 'cancelled')", name=op.f("ck_webhook_delivery_status")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_delivery")),
        sa.UniqueConstraint("endpoint_id", "event_id", name="uq_webhook_delivery_endpoint_id_event_id"),
    )
    op.create_index(
        "ix_webhook_delivery_due",
        "webhook_delivery",
        ["endpoint_id", "due_us"],
        unique=False,
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_table(
        "webhook_endpoint",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("types", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Integer(), nullable=False),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("previous_secret", sa.Text(), nullable=True),
        sa.Column("previous_until_us", sa.BigInteger(), nullable=True),
        sa.Column("failing_since_us", sa.BigInteger(), nullable=True),
        sa.Column("flagged_us", sa.BigInteger(), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("enabled IN (0, 1)", name=op.f("ck_webhook_endpoint_enabled")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoint")),
        sa.UniqueConstraint("url", name=op.f("uq_webhook_endpoint_url")),
    )


def downgrade() -> None:
    op.drop_table("webhook_endpoint")
    op.drop_index(
        "ix_webhook_delivery_due",
        table_name="webhook_delivery",
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.drop_table("webhook_delivery")
    op.drop_table("webhook_attempt")
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
    op.drop_table("stock_part")
    op.drop_table("stock_level")
    op.drop_table("stock_ledger")
    op.drop_table("sandbox_trade")
    op.drop_table("sandbox_refund")
    op.drop_index("ix_reconciliation_log_difference_id", table_name="reconciliation_log")
    op.drop_table("reconciliation_log")
    op.drop_index(
        "uq_reconciliation_difference_live",
        table_name="reconciliation_difference",
        sqlite_where=sa.text("state IN ('open', 'dismissed')"),
        postgresql_where=sa.text("state IN ('open', 'dismissed')"),
    )
    op.drop_table("reconciliation_difference")
    op.drop_index("ix_payment_refund_log_refund_id", table_name="payment_refund_log")
    op.drop_table("payment_refund_log")
    op.drop_index(
        "ix_payment_refund_pending",
        table_name="payment_refund",
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.drop_index("ix_payment_refund_payment_id", table_name="payment_refund")
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
    op.drop_index(
        "ix_order_order_arriving",
        table_name="order_order",
        sqlite_where=sa.text("status = 'shipped'"),
        postgresql_where=sa.text("status = 'shipped'"),
    )
    op.drop_index("ix_order_order_buyer", table_name="order_order")
    op.drop_table("order_order")
    op.drop_table("order_log")
    op.drop_table("order_line")
    op.drop_index(
        "ix_feed_event_owner",
        table_name="feed_event",
        sqlite_where=sa.text("owner IS NOT NULL"),
        postgresql_where=sa.text("owner IS NOT NULL"),
    )
    op.drop_table("feed_event")
    op.drop_table("feed_counter")
    op.drop_table("cart_item")
