"""One folder per backend; none imports another."""
