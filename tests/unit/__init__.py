"""Rules and policies: no I/O beyond memory, no sleep; mirrors src/."""
