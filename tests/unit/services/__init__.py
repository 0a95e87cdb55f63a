"""Rules of the services, without I/O."""
