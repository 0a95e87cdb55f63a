"""One test per capability row, named by it."""
