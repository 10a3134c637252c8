"""The parts of `python -m bench.feeds`."""
