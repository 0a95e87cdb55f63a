"""The event feed: what happened, numbered in the order in which it was committed."""
