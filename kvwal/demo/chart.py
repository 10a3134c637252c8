"""A series of amounts over time as text: a bar of █ from zero up to each, of ▒ from zero down."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["chart", "money"]


def money(cents: int) -> str:
    """An amount for people."""
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100:,}.{abs(cents) % 100:02d}"


def chart(amounts: Sequence[int], width: int = 60, height: int = 12) -> list[str]:
    """Lines of text: a column for each of `width` equal parts of the series, which shows the last amount in it."""
    if not amounts:
        return []
    width = min(width, len(amounts))
    columns = [amounts[(i + 1) * len(amounts) // width - 1] for i in range(width)]
    top, bottom = max(0, *columns), min(0, *columns)
    # What one line stands for; the lines above zero, and those below.
    step = max(1, -(-(top - bottom) // height))
    above, below = -(-top // step), -(bottom // step)
    lines: list[str] = []
    for line in range(above, -below - 1, -1):
        label = money(line * step) if line in (above, 0, -below) else ""
        if line == 0:
            lines.append(f"{label:>14} ┼{'─' * width}")
            continue
        # A line is filled by what reaches half of it.
        bar = "█" if line > 0 else "▒"
        reached = [2 * amount * (1 if line > 0 else -1) >= (2 * abs(line) - 1) * step for amount in columns]
        lines.append(f"{label:>14} │{''.join(bar if each else ' ' for each in reached)}".rstrip())
    if width > 1:
        lines.append(f"{'':>16}1{len(amounts):>{width - 1},}")
    return lines
