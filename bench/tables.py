"""`python -m bench.tables`: what tables with types cost, beside the store as it is, and beside other maps in files."""

from __future__ import annotations

import sys
from typing import Final

from bench.parts import Part, Size, run_parts
from bench.typed.counter import counter
from bench.typed.rows import rows

__all__ = ["main"]

_PARTS: Final = {
    "rows": Part("get, put and scan of str to JSON", rows),
    "counter": Part("add to one key by many threads, each durable", counter),
}
_SIZES: Final = {
    "rows": Size(20_000, 1_000, "keys, with values of 130 bytes of JSON"),
    "threads": Size(16, 4, "threads that add"),
    "adds": Size(200, 20, "adds of each thread"),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures. Exit status: 1 if an add was lost."""
    return run_parts("python -m bench.tables", __doc__, _PARTS, _SIZES, arguments)


if __name__ == "__main__":
    sys.exit(main())
