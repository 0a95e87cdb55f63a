"""ROOM 1: connections, transactions, group commit and migrations; no business SQL."""
