"""Real processes killed, servers stopped."""
