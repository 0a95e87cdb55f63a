"""ROOM 2: reliable messaging, useful alone; it knows nothing of orders."""
