"""The map of the system: every message, every exchange, queue and key, and the values that services share."""
