"""Backups and archives of a store: one form for both, in a destination that is a directory or an object store.

A destination holds bases (the pages of one generation) and units (the commits `(first, last]`). A moment is restored
from the newest base that is at or before it, and the units behind that.
"""
