"""Every backend passes this suite."""
