"""The parts of `python -m bench.tables`."""
