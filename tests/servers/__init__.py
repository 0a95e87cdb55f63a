"""Real servers, started privately for a test run."""
