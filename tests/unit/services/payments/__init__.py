"""Rules of payments and their providers, without I/O."""
