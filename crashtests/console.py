"""What the run prints: a progress line, the table, the violations with their replay commands."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from crashtests.explorer import Case, Tally


@dataclass(slots=True)
class Result:
    """What one part did."""

    part: str
    states: int = 0
    faults: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    #: Set when the part could not run here, with the reason.
    skipped: str = ""
    notes: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)

    def take(self, tally: Tally) -> None:
        """Add what an explorer counted."""
        self.states += tally.states
        self.faults += tally.faults
        for text, case in tally.violations:
            self.violations.append(f"{text}\n    replay: {replay_command(self.part, case)}")


def replay_command(part: str, case: Case | str) -> str:
    """The line that shows a violation again."""
    if isinstance(case, str):
        return f"python -m crashtests --part {part} {case}"
    return f"python -m crashtests --replay {shlex.quote(case.text())}"


class Progress:
    """One line that is written over, on a terminal; a line now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._every_s = 0.2 if self._terminal else 15.0
        self._shown_s = 0.0

    def show(self, part: str, share: float, states: int, seconds: float, violations: int) -> None:
        now = time.monotonic()
        if self._quiet or now - self._shown_s < self._every_s:
            return
        self._shown_s = now
        share = min(max(share, 0.0), 1.0)
        bar = ("#" * round(share * 24)).ljust(24, ".")
        rate = states / seconds if seconds > 0 else 0.0
        line = f"{part:<12} [{bar}] {share:4.0%}  {states:>9,} states  {rate:>7,.0f}/s  {violations} violations"
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else line + "\n")
        self._stream.flush()

    def clear(self) -> None:
        if self._terminal and not self._quiet:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def table(results: list[Result]) -> str:
    """The closing table."""
    rows = [("part", "states explored", "faults injected", "violations", "seconds", "states/s")]
    for r in results:
        if r.skipped:
            rows.append((r.part, "skipped", "", "", "", ""))
        else:
            rate = f"{r.states / r.seconds:,.0f}" if r.seconds and r.states else ""
            rows.append((r.part, f"{r.states:,}", f"{r.faults:,}", str(len(r.violations)), f"{r.seconds:.1f}", rate))
    seconds = sum(r.seconds for r in results)
    rows.append(
        (
            "all",
            f"{sum(r.states for r in results):,}",
            f"{sum(r.faults for r in results):,}",
            str(sum(len(r.violations) for r in results)),
            f"{seconds:.1f}",
            "",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        cells = [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
        if index in (0, len(rows) - 2):
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_json(results: list[Result], **about: Any) -> str:
    """The same for a machine."""
    return json.dumps(about | {"parts": [asdict(result) for result in results]}, indent=1)
