"""ROOM 4: translators between the outside world and the services; no SQL, no rules, no transactions."""
