"""Named tables with keys and values of Python's types, over what reads and writes bytes."""
