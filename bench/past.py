"""`python -m bench.past`: what past moments cost to read and to keep, beside the same of now, and beside ZODB."""

from __future__ import annotations

import sys
from typing import Final

from bench.history.bases import bases
from bench.history.moments import moments
from bench.history.puts import puts
from bench.history.reads import reads
from bench.history.sealing import sealing
from bench.history.versions import versions
from bench.parts import Part, Size, run_parts

__all__ = ["main"]

_PARTS: Final = {
    "reads": Part("cold reads of a past moment, beside cold reads of now", reads),
    "puts": Part("puts with the window that is there by default, and without", puts),
    "versions": Part("ten versions of a key in a long log", versions),
    "sealing": Part("making the key index of a sealed segment", sealing),
    "bases": Part("checkpoints with few and many bases", bases),
    "moments": Part("memory with many past moments open", moments),
}
_SIZES: Final = {
    "keys": Size(200_000, 20_000, "keys in the tree, with values of 100 bytes"),
    "segments": Size(4, 1, "segments of 16 MiB between base and moment"),
    "times": Size(10, 2, "and so many times as many of them"),
    "durable": Size(3000, 200, "durable puts"),
    "puts": Size(200_000, 10_000, 'puts at "os"'),
    "log": Size(64, 4, "segments of 16 MiB that versions are looked for in"),
    "sealed": Size(8, 2, "segments of 16 MiB to seal"),
    "bases": Size(1000, 30, "bases of a checkpoint"),
    "moments": Size(1000, 100, "past moments open at once"),
    "window": Size(2048, 64, "MiB of log that they are in"),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    return run_parts("python -m bench.past", __doc__, _PARTS, _SIZES, arguments)


if __name__ == "__main__":
    sys.exit(main())
