"""The parts of `python -m bench.past`."""
