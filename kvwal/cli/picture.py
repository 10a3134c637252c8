"""A small picture of a store: which commits are in the pages, which in the log, and what was cut off behind them.

The commits lie on one line from the first to the last, to scale, but each part that is not empty gets a column:

    in the pages   ████████████████████▓▓▓▓▓
    in the log                         ▓▓▓▓▓▒▒▒▒▒×

█ in the pages only, ▓ in the pages and still in the log, ▒ in the log only (recovery replays it), × cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from kvwal.engine.recovery import RecoveryReport

__all__ = ["LEGEND", "Extent", "bar", "coloured", "drawing"]

LEGEND = "█ in the pages  ▓ in pages and log  ▒ in the log only: replayed  × cut off"

_STYLES = {"█": "green", "▓": "cyan", "▒": "yellow", "×": "bold red", "·": "dim"}


@dataclass(frozen=True, slots=True)
class Extent:
    """What the picture shows, as commit numbers."""

    log_start: int  #: first commit that the log still holds
    checkpoint: int  #: last commit in the pages
    last: int  #: last commit there is
    cut_bytes: int  #: bytes after it that recovery cut off

    @classmethod
    def of(cls, report: RecoveryReport, log_start: int) -> Extent:
        """The extent that a recovery found, in a log that begins with commit `log_start`."""
        return cls(log_start, report.checkpoint_seqno, report.last_seqno, report.cut_bytes)


def bar(extent: Extent, width: int) -> Text:
    """One line of `width` columns."""
    cut = "×" if extent.cut_bytes else ""
    left = width - len(cut)
    both = max(0, extent.checkpoint - extent.log_start + 1)
    counts = {
        "█": max(0, extent.checkpoint - both),
        "▓": both,
        "▒": max(0, extent.last - max(extent.checkpoint, extent.log_start - 1)),
    }
    text = "".join(char * columns for char, columns in zip(counts, _share(list(counts.values()), left), strict=True))
    return coloured((text + cut).ljust(width, "·"))


def drawing(extent: Extent, width: int) -> list[Text]:
    """Two lines, one for the pages and one for the log, with their numbers."""
    line = bar(extent, width).plain
    pages = "".join("█" if char in "█▓" else " " for char in line)
    log = "".join(" " if char in "█·" else char for char in line)
    kept = f"commits {extent.log_start:,} to {extent.last:,}" if extent.last >= extent.log_start else "no commits"
    cut = f", {extent.cut_bytes:,} bytes cut off" if extent.cut_bytes else ""
    in_pages = f"commits 1 to {extent.checkpoint:,}" if extent.checkpoint else "no commits"
    return [
        Text("pages ") + coloured(pages) + f"  {in_pages}",
        Text("log   ") + coloured(log) + f"  {kept}{cut}",
    ]


def _share(counts: list[int], width: int) -> list[int]:
    """Columns for each count: in proportion, at least one for a count above zero, `width` in all unless all are 0."""
    total = sum(counts)
    if total == 0 or width <= 0:
        return [0 for _ in counts]
    columns = [max(1, round(count * width / total)) if count else 0 for count in counts]
    # Rounding, and the columns given to what is small, are taken from or added to the widest.
    widest = columns.index(max(columns))
    columns[widest] = max(0, columns[widest] + width - sum(columns))
    return columns


def coloured(line: str) -> Text:
    """The line with its blocks in their colours."""
    text = Text()
    for char in line:
        text.append(char, _STYLES.get(char))
    return text
