"""Tests of holdfast."""
