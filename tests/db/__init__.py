"""The database room on real databases: transactions, what is lost and what is not, migrations, group commit."""
