"""Carts: what buyers have put together before they order."""
