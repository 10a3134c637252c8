"""Stores that another process writes, read beside it without a lock."""
