"""Orders and messages end to end, HTTP included."""
