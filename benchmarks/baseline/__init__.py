"""The baseline: the order service a good engineer writes in a day, with no code of holdfast in it."""
