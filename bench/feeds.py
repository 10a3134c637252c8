"""`python -m bench.feeds`: what the feed of changes costs, beside its peers, and whether it tells each commit once."""

from __future__ import annotations

import sys
from typing import Final

from bench.feed.catch_up import catch_up
from bench.feed.delivery import delivery
from bench.feed.many import many
from bench.parts import Part, Size, run_parts

__all__ = ["main"]

_PARTS: Final = {
    "catch-up": Part("every change from the first on, from the files", catch_up),
    "delivery": Part("from a durable commit to its subscribers", delivery),
    "many": Part("many subscribers, each told of each commit once, in order", many),
}
_SIZES: Final = {
    "changes": Size(1_000_000, 20_000, "changes to catch up on"),
    "deliveries": Size(10_000, 1000, "commits of which subscribers are told"),
    "rate": Size(1000, 1000, "commits a second"),
    "commits": Size(1_000_000, 20_000, "commits of which many subscribers are told"),
    "writers": Size(8, 8, "threads that write"),
    "subscribers": Size(10, 10, "threads that follow"),
    "rest": Size(100_000, 2_000, "commits for which one subscriber rests"),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures. Exit status: 1 if a subscriber missed a commit, or was told of one twice."""
    return run_parts("python -m bench.feeds", __doc__, _PARTS, _SIZES, arguments)


if __name__ == "__main__":
    sys.exit(main())
