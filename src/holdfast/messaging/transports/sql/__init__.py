"""Messages in the tables of SQLite or PostgreSQL."""
