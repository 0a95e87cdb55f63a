"""ROOM 3: selling limited stock; one folder per service, all of one shape."""
