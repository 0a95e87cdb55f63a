"""Property tests that try the same examples on every run: a failure is the code's, never the day's."""

from __future__ import annotations

from hypothesis import settings

steady = settings(derandomize=True, deadline=None, max_examples=200)
