"""Reconciliation: the books compared again and again; each difference is a row with a way to mend it."""
