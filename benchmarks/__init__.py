"""Benchmarks that compare holdfast with an honest hand-rolled order service over HTTP."""
