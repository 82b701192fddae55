"""Placeholder until the first operation lands."""
