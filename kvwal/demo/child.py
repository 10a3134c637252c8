"""The process that writes and is killed. `python -m kvwal.demo.child library|bank|trades|restore PATH ...`"""

from __future__ import annotations

import os
import sys

from kvwal.demo import archived, bank, library, trades

__all__ = ["main"]


def _say(text: str) -> None:
    # One write call for a line: it is in the pipe as a whole or not at all.
    os.write(1, text.encode() + b"\n")


def main(arguments: list[str]) -> None:
    """Do the work of one life."""
    job, *rest = arguments
    {"library": library.work, "bank": bank.work, "trades": trades.work, "restore": archived.work}[job](rest, _say)


if __name__ == "__main__":
    main(sys.argv[1:])
